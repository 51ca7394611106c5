"""README.md of an exported folder: what the model is, how it is used, what was measured.

In: the configuration and the figures of an export.  Out: a model card in the form that model hubs read, YAML
    first.  Every number on it was computed by the command that wrote it, or is in
    checkpoint.json; what was not measured is not mentioned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualroute import __version__
from dualroute.evaluate.load import Loaded
from dualroute.export.config import ExportConfig
from dualroute.export.hf import folder as huggingface
from dualroute.export.quality import samples
from dualroute.model import ModelConfig
from dualroute.model.checkpoint.lineage import history, total_tokens

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
texts = model.generate(**inputs, max_new_tokens=50, do_sample=True, top_p=0.95)
print(tokenizer.batch_decode(texts, skip_special_tokens=True))
```"""


_USE_PIPELINE = """\
```python
from transformers import pipeline

run = pipeline("TASK", model="path/to/this/folder", trust_remote_code=True)
```"""
_GENERATE = (
    "`generate` keeps a cache; greedy search, sampling and beam search work, assisted decoding does not. "
)
#: what transformers calls a model → a hub's name of its task, and the words for it
_PURPOSES = {
    "CausalLM": ("text-generation", "A causal language model"),
    "MaskedLM": ("fill-mask", "A model that reads both sides of each token and finds masked ones,"),
    "SequenceClassification": ("text-classification", "A classifier of texts"),
    "TokenClassification": ("token-classification", "A classifier of tokens"),
    "QuestionAnswering": ("question-answering", "A model that finds answers in texts,"),
}


def write_export(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any]
) -> dict[str, Any]:
    """Write and verify the Hugging Face folder, its card last; returns the figures."""
    written = huggingface.write(loaded, folder)
    figures = {**written, "parity": huggingface.verify(loaded, folder, samples(config, loaded))}
    (folder / "README.md").write_text(card(config, loaded, folder, quality, figures), encoding="utf-8")
    return figures


def card(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any], figures: dict[str, Any]
) -> str:
    """The text of README.md."""
    shape = loaded.model.config
    purpose = huggingface.purpose_of(shape)
    tag, kind = _PURPOSES[purpose]
    front = ["library_name: transformers", f"pipeline_tag: {tag}", "tags: [dualroute, custom_code]"]
    if config.license is not None:
        front.append(f"license: {config.license}")
    name = Path(config.output).name
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {name}", "",
            f"{kind} of {loaded.model.num_parameters():,} parameters with DualRouting "
            f"attention, {_attention(shape)}", "",
            "## Use", "", _USE if purpose == "CausalLM" else _USE_PIPELINE.replace("TASK", tag), "",
            f"It needs torch and transformers; the `dualroute` package is not needed. Texts begin with "
            f"{_begin(loaded)}. Batches may be padded; the attention mask says where. "
            + (_GENERATE if purpose == "CausalLM" else "")
            + f"At most {shape.max_context:,} tokens.", "",
            "## Figures", "", *_table(loaded, folder, quality, figures), "",
            "`export.json` holds all figures, those of the comparison at each length among them.", "",
            "## History", "", "Trainings and operations, oldest first:", "", *_history(loaded), "",
            "## Source", "",
            f"The Python files are those of dualroute {__version__} (Apache-2.0) that trained the model; "
            f"only their imports were rewritten. {_license(config)}", "",
        ]
    )  # fmt: skip


def _attention(shape: ModelConfig) -> str:
    kinds = {
        "dense": "every head reading every token (the dense baseline)",
        "local": "every head reading a sliding window",
        "interleaved": f"one dense layer in every {shape.dense_every} and sliding windows in the others",
        "dual": f"{shape.global_heads} global and {shape.local_heads} local heads in each layer",
    }
    size = f"{shape.num_layers} layers, width {shape.dim}, vocabulary {shape.vocab_size:,}"
    text = f"{kinds[shape.attention]}; {size}."
    if shape.attention == "dual" and shape.global_mode != "full":
        text += (
            f" Long texts are routed: the {shape.top_k} best blocks of {shape.block} tokens are read exactly."
        )
    return text


def _begin(loaded: Loaded) -> str:
    bos = loaded.tokenizer.bos_id
    return (
        "no special token"
        if bos < 0
        else f"`{loaded.tokenizer.pieces()[bos]}`, which the tokenizer puts there"
    )


def _table(loaded: Loaded, folder: Path, quality: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    dtype = str(loaded.model.embedding.weight.dtype).removeprefix("torch.")
    checkpoint = loaded.checkpoint
    rows = [("weights", f"{(folder / 'model.safetensors').stat().st_size / 1e6:,.1f} MB, {dtype}")]
    tokens = total_tokens(checkpoint.metadata)
    if tokens:
        rows.append(("trained on", f"{tokens:,} tokens in all (see History)"))
    if quality:
        place = f"{quality['measured_on']}, context {quality['context']:,}"
        rows.append((f"loss (nats per token) on {place}", f"{quality['loss']:.4f}"))
        rows.append(("perplexity", f"{quality['perplexity']:.2f}"))
        if "bits_per_byte" in quality:
            rows.append(("bits per byte", f"{quality['bits_per_byte']:.4f}"))
            rows.append(("tokens scored", f"{quality['tokens']:,}"))
    parity = figures["parity"]
    lengths = ", ".join(parity["logits"])
    rows.append(
        (f"largest difference of logits from dualroute's (texts of {lengths} tokens)",
         f"{max(parity['logits'].values()):.1e}")
    )  # fmt: skip
    rows.append(("texts with the same token ids", f"{parity['texts']} of {parity['texts']}"))
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _history(loaded: Loaded) -> list[str]:
    return [f"{number}. {line}" for number, line in enumerate(history(loaded.checkpoint), 1)]


def _license(config: ExportConfig) -> str:
    if config.license is None:
        return "No license of the weights was stated."
    return f"The weights are under {config.license}."
