"""Folders of models that were trained for a task, or read both sides of each token: loaded as such."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dualroute.data.masking import mask_id  # noqa: E402
from dualroute.data.tokenizer import Tokenizer  # noqa: E402
from dualroute.export.hf import check_folder  # noqa: E402
from dualroute.export.hf import folder as huggingface  # noqa: E402

TASKS = {
    "classes": ("SequenceClassification", {"kind": "sequence", "labels": ["bad", "good", "so so"]}),
    "first": ("SequenceClassification", {"kind": "sequence", "labels": ["a", "b"], "pooling": "first"}),
    "mean": ("SequenceClassification", {"kind": "sequence", "labels": ["a", "b"], "pooling": "mean"}),
    "number": ("SequenceClassification", {"kind": "number"}),
    "tokens": ("TokenClassification", {"kind": "token", "labels": ["O", "B", "I"]}),
    "answers": ("QuestionAnswering", {"kind": "span"}),
}


@pytest.fixture
def checked(loaded, tmp_path, monkeypatch):
    """Write a folder and load it as its user does: compared as an export is, but in this process."""
    monkeypatch.setattr(huggingface, "run_check", lambda folder, said: check_folder.check(str(folder), said))

    def run(purpose, **options):
        made, folder = loaded(**options), tmp_path / "hf"
        folder.mkdir()
        huggingface.write(made, folder)
        assert huggingface.verify(made, folder, ["the old river"])["class"] == f"DualRoutingFor{purpose}"
        auto = getattr(transformers, f"AutoModelFor{purpose}")
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return model, folder

    return run


@pytest.mark.parametrize("name", TASKS)
def test_a_model_of_a_task(name, checked):
    purpose, head = TASKS[name]
    model, folder = checked(purpose, task_head=head)
    assert [model.config.id2label[i] for i in range(len(head.get("labels", [])))] == head.get("labels", [])
    assert model.config.num_labels == (1 if name == "number" else len(head.get("labels", [])) or 2)
    if name == "classes":  # what `pipeline` does of it
        run = transformers.pipeline("text-classification", str(folder), trust_remote_code=True)
        assert {score["label"] for score in run("the old river", top_k=None)} == set(head["labels"])


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder(tied, checked):
    model, folder = checked("MaskedLM", causal=False, tie_embeddings=tied)
    ids = torch.arange(4, 24)[None]
    labels = torch.full_like(ids, -100)
    labels[0, 3] = 9
    out = model(input_ids=ids, labels=labels)
    wanted = torch.nn.functional.cross_entropy(out.logits[0, 3:4], labels[0, 3:4])
    torch.testing.assert_close(out.loss, wanted)
    assert not model.config.use_cache
    assert not (folder / "generation_config.json").exists()
    other = ids.clone()
    other[0, 15] += 1  # a later token changes what is said of an earlier one
    assert not torch.equal(model(input_ids=other).logits[0, 3], out.logits[0, 3])


@torch.no_grad()
def test_a_hidden_word_is_found_by_the_pipeline(checked, tiny_dataset):
    """The space before a hidden word is hidden with it, as in training."""
    model, folder = checked("MaskedLM", causal=False)
    own = Tokenizer(tiny_dataset / "tokenizer.model")
    run = transformers.pipeline("fill-mask", str(folder), trust_remote_code=True)
    assert run.tokenizer.mask_token_id == mask_id(own)
    found = run(f"the {run.tokenizer.mask_token} river", top_k=4)
    ids = [own.bos_id, *own.encode("the"), mask_id(own), *own.encode(" river")]
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, ids.index(mask_id(own))]
    assert [each["token"] for each in found] == logits.topk(4).indices.tolist()


@pytest.mark.slow
@torch.no_grad()
def test_a_model_is_one_graph_for_a_compiler(checked):
    """The routes are operators in it; another folder's have other names."""
    model, _ = checked("MaskedLM", causal=False, num_layers=1)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.randint(4, 320, (2, 61), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, rtol=0, atol=1e-5)
