"""Taking a checkpoint elsewhere: Hugging Face, ONNX, torch.export.

    command.py                  `dualroute export`: which writer, what is measured, export.json
    hf/                         a folder that transformers loads; model_card.py its README
    masked.py                   the model as one graph for any batch and length
    onnx_file.py                that graph for onnxruntime; torch_program.py for torch alone
    quality.py                  what it is measured on
    parity.py                   how an export is compared with the model before its folder gets its name

plain_backend.py stands in for a module of the attention in an exported folder.
"""
