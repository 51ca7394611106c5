"""Taking a checkpoint elsewhere: Hugging Face, ONNX, torch.export.

    command.py                  `dualroute export`: which writer, what is measured, export.json
    huggingface.py              a folder that transformers loads; model_card.py its README
    bundle.py                   these very source files, made ready to lie in that folder
    configuration_dualroute.py  \\
    modeling_dualroute.py        } the part of it that speaks transformers
    tokenization_dualroute.py   /
    tokenizer_files.py          the sentencepiece model as tokenizer.json, or itself where that is not equal
    masked.py                   the model as one graph for any batch and length
    onnx_file.py                that graph for onnxruntime; torch_program.py for torch alone
    quality.py                  what it is measured on
    parity.py                   how an export is compared with the model before its folder gets its name
"""
