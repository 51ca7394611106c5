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
from dualroute.export.hf.media import Medium
from dualroute.export.quality import samples
from dualroute.model import ModelConfig
from dualroute.model.checkpoint.lineage import history, total_tokens

_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder{tokenizer}){pad}
model = AutoModelForCausalLM.from_pretrained(folder{model})
inputs = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
texts = model.generate(**inputs, max_new_tokens=50, do_sample=True, top_p=0.95)
print(tokenizer.batch_decode(texts, skip_special_tokens=True))
```"""
_LLAMA_CPP = """\
```python
from llama_cpp import Llama

model = Llama("path/to/this/folder/model.gguf", n_ctx=0)
print(model("Once upon a time", max_tokens=50)["choices"][0]["text"])
```"""
_TRUST = ", trust_remote_code=True"
OWN_CLASS = "DualRoutingFor"


_USE_PIPELINE = """\
```python
from transformers import pipeline

run = pipeline("TASK", model="path/to/this/folder", trust_remote_code=True)
```"""
_USE_CLASS = """\
```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
scores = model(**tokenizer("Who came?", "The old man came.", return_tensors="pt"))
```"""
_USE_ITEMS = """\
```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder", trust_remote_code=True)
best = model.rank([["NAME OF AN ITEM", "NAME OF THE NEXT ONE"]], best=10)
```"""
#: how the pipelines of what is no text are called
_INPUTS = {
    "ImageClassification": 'run("image.png")',
    "AudioClassification": 'run({"array": samples, "sampling_rate": rate})',
    "CTC": 'run({"array": samples, "sampling_rate": rate})["text"]',
}
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
    "ImageClassification": ("image-classification", "A classifier of images"),
    "AudioClassification": ("audio-classification", "A classifier of recordings"),
    "CTC": ("automatic-speech-recognition", "A model that writes what is said in recordings,"),
    "NextItem": ("other", "A model that ranks the items that come next,"),
}


def write_export(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any]
) -> dict[str, Any]:
    """Write and verify the Hugging Face folder, its card last; returns the figures."""
    written = huggingface.write(loaded, folder, config.layout)
    figures = {**written, "parity": huggingface.verify(loaded, folder, samples(config, loaded))}
    write_card(config, loaded, folder, quality, figures)
    return figures


def write_card(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Write README.md."""
    text = card(config, loaded, folder, quality, figures)
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(
    config: ExportConfig, loaded: Loaded, folder: Path, quality: dict[str, Any], figures: dict[str, Any]
) -> str:
    """The text of README.md."""
    gguf = config.format == "gguf"
    own = figures.get("class", "").startswith(OWN_CLASS)
    tag, kind = _PURPOSES[huggingface.purpose_of(loaded.model.config)]
    tags = ["dualroute", "gguf"] if gguf else ["dualroute", "custom_code"] if own else ["dualroute"]
    front = [f"pipeline_tag: {tag}", f"tags: [{', '.join(tags)}]"]
    front = [*([] if gguf else ["library_name: transformers"]), *front]
    if config.license is not None:
        front.append(f"license: {config.license}")
    name = Path(config.output).name
    dense = loaded.model.config.attention == "dense"
    attention = "DualRouting" if own else "dense" if dense else "sliding-window"
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {name}", "",
            f"{kind} of {loaded.model.num_parameters():,} parameters with {attention} "
            f"attention, {_attention(loaded.model.config)}", "",
            "## Use", "", *(_use_of_gguf(loaded, figures) if gguf else _use(loaded, folder, figures)), "",
            "## Figures", "", *_table(loaded, folder, quality, figures), "",
            "`export.json` holds all figures, those of the comparison among them.", "",
            "## History", "", "Trainings and operations, oldest first:", "", *_history(loaded), "",
            *_training(loaded),
            "## Source", "",
            f"{_source(loaded, figures)}{_license(config)}", "",
        ]
    )  # fmt: skip


def _use(loaded: Loaded, folder: Path, figures: dict[str, Any]) -> list[str]:
    shape = loaded.model.config
    purpose = huggingface.purpose_of(shape)
    own = str(figures.get("class", "")).startswith(OWN_CLASS)
    own_tokenizer = (folder / huggingface.TOKENIZER_CODE).is_file()
    code = _USE_PIPELINE.replace("TASK", _PURPOSES[purpose][0])
    if purpose == "CausalLM":
        code = _TRANSFORMERS.format(
            model=_TRUST if own else "",
            tokenizer=_TRUST if own or own_tokenizer else "",
            pad="" if loaded.tokenizer.pad_id >= 0 else "\ntokenizer.pad_token = tokenizer.eos_token",
        )
    elif purpose == "QuestionAnswering":  # transformers 5 has no pipeline for it
        code = _USE_CLASS
    elif purpose == "NextItem":
        code = _USE_ITEMS
    elif purpose in _INPUTS:
        code = code.replace("\n```", f"\n{_INPUTS[purpose]}\n```").replace("```python\n\n", "```python\n")
    how = _GENERATE if purpose == "CausalLM" else ""
    if not own:
        how = (
            f"The model is a `{figures['class']}`, which other software that knows this class runs as well. "
        )
    if not shape.reads_text:
        return [code, "", _of_no_text(loaded, purpose)]
    needs = "torch and transformers" + (", and sentencepiece" if own_tokenizer else "")
    return [
        code,
        "",
        f"It needs {needs}; the `dualroute` package is not needed. {_begin(loaded)} Batches may be padded; "
        f"the attention mask says where. {how}At most {shape.max_context:,} tokens.",
    ]


def _of_no_text(loaded: Loaded, purpose: str) -> str:
    """What a user of a model of images, recordings or items has to know."""
    needs = "torch, transformers and Pillow" if purpose == "ImageClassification" else "torch and transformers"
    said = f"It needs {needs}; the `dualroute` package is not needed."
    medium = Medium.of(loaded)
    if medium is None:
        return (
            f"{said} Items are given by the names in `config.label2id`, in the order of time; `forward` "
            f"takes their ids, which are one more than these numbers (0: an item that is not known), and "
            f"gives a score for each item. At most {loaded.model.config.max_context:,} items."
        )
    if purpose == "ImageClassification":
        image = medium.kind.task.image
        other = "brought to this size" if image.resize else "refused (`do_resize=True` changes them)"
        colour = "grey" if image.channels == 1 else "red, green and blue"
        return f"{said} Images are {image.height} x {image.width} pixels, {colour}; others are {other}."
    audio = medium.kind.task.audio
    return (
        f"{said} Recordings have one channel and {audio.rate:,} samples a second (transformers resamples "
        f"where torchaudio is installed); a step is {audio.hop * audio.stack} samples, and the model was "
        f"trained on at most {medium.kind.setting.max_length:,} of them."
    )


def _use_of_gguf(loaded: Loaded, figures: dict[str, Any]) -> list[str]:
    return [
        _LLAMA_CPP,
        "",
        f"`model.gguf` is for llama.cpp and what is built on it: architecture {figures['architecture']}, "
        f"weights {figures['type']}, the tokenizer included. {_begin(loaded)} At most "
        f"{loaded.model.config.max_context:,} tokens.",
    ]


def _source(loaded: Loaded, figures: dict[str, Any]) -> str:
    if figures.get("source_files"):
        return (
            f"The Python files are those of dualroute {__version__} (Apache-2.0) that trained the model; "
            f"only their imports were rewritten. "
        )
    return f"Written by dualroute {__version__}; no code comes with the weights. "


#: setting of a training → what the card calls it
_SETTINGS = {
    "optim.lr": "learning rate",
    "optim.schedule": "schedule",
    "optim.warmup_steps": "warm-up steps",
    "optim.weight_decay": "weight decay",
    "train.tokens_per_batch": "tokens per batch",
    "train.precision": "precision",
}


def _training(loaded: Loaded) -> list[str]:
    """How the last training went, as far as its checkpoint says."""
    metadata = loaded.checkpoint.metadata
    settings = metadata.get("settings")
    said = settings if isinstance(settings, dict) else {}
    found = {key: _at(said, key) for key in _SETTINGS}
    rows = [(name, found[key]) for key, name in _SETTINGS.items() if found[key] is not None]
    rows += [(name, metadata[name]) for name in ("context", "seed", "world_size") if metadata.get(name)]
    if not said:
        return []
    table = ["| | |", "|---|---|", *(f"| {name.replace('_', ' ')} | {value} |" for name, value in rows)]
    return ["Settings of the last training:", "", *table, ""]


def _at(table: dict[str, Any], key: str) -> Any:
    """The value at ``a.b``; null where there is none."""
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None  # type: ignore[assignment]
    return table


def _attention(shape: ModelConfig) -> str:
    kinds = {
        "dense": "every head reading every token (the dense baseline)",
        "local": "every head reading a sliding window",
        "interleaved": f"one dense layer in every {shape.dense_every} and sliding windows in the others",
        "dual": f"{shape.global_heads} global and {shape.local_heads} local heads in "
        + (
            "each layer"
            if (layers := shape.global_layers) is None
            else f"layers {layers}, local ones in the others"
        ),
    }
    size = f"{shape.num_layers} layers, width {shape.dim}"
    size += f", vocabulary {shape.vocab_size:,}" if shape.reads_text else ""
    text = f"{kinds[shape.attention]}; {size}."
    if shape.attention == "dual" and shape.global_mode != "full":
        text += (
            f" Long {'texts' if shape.reads_text else 'inputs'} are routed: the {shape.top_k} best blocks of "
            f"{shape.block} {'tokens' if shape.reads_text else 'steps'} are read exactly."
        )
    return text


def _begin(loaded: Loaded) -> str:
    """How texts and chats begin and end."""
    tokenizer, pieces = loaded.tokenizer, loaded.tokenizer.pieces()
    bos = tokenizer.bos_id
    begin = "no special token" if bos < 0 else f"`{pieces[bos]}`, which the tokenizer puts there"
    ends = ", ".join(f"`{pieces[number]}`" for number in tokenizer.eos_ids)
    chat = " Chats have a template." if tokenizer.settings.chat_template is not None else ""
    return f"Texts begin with {begin}.{f' They end at {ends}.' if ends else ''}{chat}"


def _table(loaded: Loaded, folder: Path, quality: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    dtype = str(loaded.model.embedding.weight.dtype).removeprefix("torch.")
    checkpoint = loaded.checkpoint
    weights = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    rows = [("weights", f"{weights.stat().st_size / 1e6:,.1f} MB, {figures.get('type', dtype)}")]
    tokens = total_tokens(checkpoint.metadata)
    if tokens:
        rows.append(("trained on", f"{tokens:,} tokens in all (see History)"))
    if quality:
        if "score" in quality:
            rows.append((f"{quality['metric']} on {quality['measured_on']}", f"{quality['score']:.4f}"))
        else:
            place = f"{quality['measured_on']}, context {quality['context']:,}"
            hidden = "" if loaded.model.config.causal else "masked "
            rows.append((f"{hidden}loss (nats per token) on {place}", f"{quality['loss']:.4f}"))
            rows.append((f"{'pseudo-' if hidden else ''}perplexity", f"{quality['perplexity']:.2f}"))
        if "bits_per_byte" in quality:
            rows.append(("bits per byte", f"{quality['bits_per_byte']:.4f}"))
            rows.append(("tokens scored", f"{quality['tokens']:,}"))
    parity = figures["parity"]
    if "logits" in parity:
        lengths = ", ".join(parity["logits"])
        of = f"texts of {lengths} tokens" if loaded.model.config.frontend is None else lengths
        rows.append(
            (f"largest difference of logits from dualroute's ({of})",
             f"{max(parity['logits'].values()):.1e}")
        )  # fmt: skip
        if parity["texts"]:
            rows.append(("texts with the same token ids", f"{parity['texts']} of {parity['texts']}"))
    else:
        rows.append(
            ("largest difference of a weight from dualroute's", f"{parity['largest_difference']:.1e}")
        )
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _history(loaded: Loaded) -> list[str]:
    return [f"{number}. {line}" for number, line in enumerate(history(loaded.checkpoint), 1)]


def _license(config: ExportConfig) -> str:
    if config.license is None:
        return "No license of the weights was stated."
    return f"The weights are under {config.license}."
