"""A folder that transformers loads: the same logits, the same texts, with and without a cache."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dualroute.attention.backend import plain_torch  # noqa: E402
from dualroute.errors import UserError  # noqa: E402
from dualroute.export.hf import check_folder  # noqa: E402
from dualroute.export.hf import folder as huggingface  # noqa: E402
from dualroute.export.hf.modeling_dualroute import DualRoutingForCausalLM  # noqa: E402
from tests.export.conftest import KINDS  # noqa: E402
from tests.export.hf.models import GREEDY, greedy_of, ids_of, wrapped  # noqa: E402

transformers.logging.set_verbosity_error()
QUICK_KINDS = ("dual", "local", "full", "gqa")


def from_folder(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(autouse=True)
def plain_kernels():
    """The folder has no other kernels than torch's: what it must equal to the last bit uses them too."""
    with plain_torch():
        yield


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in QUICK_KINDS else pytest.mark.slow) for kind in KINDS],
)
@torch.no_grad()
def test_every_kind_of_model(kind, loaded, tmp_path):
    made = loaded(**KINDS[kind])
    folder = tmp_path / "hf"
    folder.mkdir()
    huggingface.write(made, folder)
    model = from_folder(folder)
    assert type(model).__module__.startswith("transformers_modules.")
    for length in (1, 5, 8, 61, 160):
        ids = ids_of(length, batch=2)
        assert torch.equal(model(input_ids=ids).logits, made.model(ids))
    prompt = ids_of(61)
    out = model.generate(input_ids=prompt, max_new_tokens=20, **GREEDY)
    assert out[0, 61:].tolist() == greedy_of(made.model, prompt[0].tolist(), 20)

    model.save_pretrained(tmp_path / "again")
    again = from_folder(tmp_path / "again")
    assert torch.equal(again(input_ids=prompt).logits, made.model(prompt))
    tied = again.lm_head.weight is again.model.embedding.weight
    assert tied == made.model.config.tie_embeddings


@pytest.mark.parametrize(
    "options",
    [{}, {"attention": "local"}, pytest.param({"num_heads": 8, "num_kv_heads": 4}, marks=pytest.mark.slow)],
)
def test_padded_rows_give_what_they_give_alone(options):
    ours, model = wrapped(**options)
    rows = [ids_of(length, seed=length)[0].tolist() for length in (50, 3, 17, 17)]
    batch = torch.tensor([[0] * (50 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (50 - len(row)) + [1] * len(row) for row in rows])
    for use_cache in (True, False):
        out = model.generate(
            input_ids=batch, attention_mask=mask, max_new_tokens=18, use_cache=use_cache, **GREEDY
        )
        for row, text in zip(rows, out, strict=True):
            assert text[50:].tolist() == greedy_of(ours, row, 18)


def test_padding_on_the_right_changes_no_logits():
    ours, model = wrapped()
    ids = ids_of(40, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    for use_cache in (True, False):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(logits[1, :25], ours(ids[1:, :25])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[0], ours(ids[:1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_beam_search_with_a_cache_is_the_one_without(padded):
    _, model = wrapped()
    ids, mask = ids_of(40, batch=3), torch.ones(3, 40, dtype=torch.long)
    if padded:
        mask[0, :13] = 0
        mask[2, :30] = 0
    texts = [
        model.generate(
            input_ids=ids, attention_mask=mask, num_beams=4, num_return_sequences=2, max_new_tokens=25,
            use_cache=use_cache, **GREEDY,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) == 6


def test_sampling_with_a_cache_is_the_one_without():
    _, model = wrapped()
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            model.generate(
                input_ids=ids_of(30), do_sample=True, temperature=0.8, top_p=0.9, num_return_sequences=3,
                max_new_tokens=25, use_cache=use_cache, eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip
    assert torch.equal(*texts)
    assert not torch.equal(texts[0][0], texts[0][1])


def test_auto_is_decided_by_the_length_to_come():
    """As in `dualroute generate`: the text that is asked for, and not the model's context, decides."""
    ours, model = wrapped(global_mode="auto", auto_break_even=64)
    for new in (4, 40):  # read in full until 64 tokens, routed above
        out = model.generate(input_ids=ids_of(60), max_new_tokens=new, **GREEDY)
        assert out[0, 60:].tolist() == greedy_of(ours, ids_of(60)[0].tolist(), new)


@torch.no_grad()
def test_a_cache_goes_on_where_it_was():
    ours, model = wrapped()
    ids = ids_of(100, batch=2)
    first = model(input_ids=ids[:, :61], use_cache=True)
    second = model(input_ids=ids[:, 61:99], past_key_values=first.past_key_values)
    last = model(
        input_ids=ids[:, 99:], past_key_values=second.past_key_values, attention_mask=torch.ones(2, 100)
    )
    assert last.past_key_values.get_seq_length() == 100
    got = torch.cat([first.logits, second.logits, last.logits], 1)
    torch.testing.assert_close(got, ours(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("asked", [True, None])
@torch.no_grad()
def test_turns_of_unequal_length_go_on_from_one_cache(asked):
    """Each row gives what it gives alone; null: a cache that was not asked for."""
    ours, model = wrapped()
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(4, n, generator=generator) < share for n, share in ((40, 0.6), (3, 0.4), (30, 0.7))]
    rows = [ids_of(mask.shape[1], batch=4, seed=n) for n, mask in enumerate(masks)]
    cache, logits = None, []
    for ids, mask in zip(rows, masks, strict=True):
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=asked)
        cache, _ = out.past_key_values, logits.append(out.logits)
    assert cache.get_seq_length() == 73
    for row in range(4):
        text = torch.cat([ids[row][mask[row]] for ids, mask in zip(rows, masks, strict=True)])
        got = torch.cat([part[row][mask[row]] for part, mask in zip(logits, masks, strict=True)])
        torch.testing.assert_close(got, ours(text[None])[0], rtol=0, atol=1e-4)


def test_the_loss_of_labels_is_that_of_next_tokens():
    ours, model = wrapped()
    ids = ids_of(50, batch=2)
    labels = ids.clone()
    labels[0, :20] = -100
    loss = model(input_ids=ids, labels=labels).loss
    wanted = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_packed_texts_do_not_see_each_other():
    ours, model = wrapped()
    one, two = ids_of(30), ids_of(45, seed=1)
    positions = torch.cat([torch.arange(30), torch.arange(45)])[None]
    logits = model(input_ids=torch.cat([one, two], 1), position_ids=positions).logits
    torch.testing.assert_close(logits[:, :30], ours(one), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[:, 30:], ours(two), rtol=0, atol=1e-5)


def test_bfloat16(loaded, tmp_path):
    made = loaded(dtype="bfloat16")
    (tmp_path / "hf").mkdir()
    huggingface.write(made, tmp_path / "hf")
    ids = ids_of(61)
    model = from_folder(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(input_ids=ids).logits, made.model(ids))
    assert from_folder(tmp_path / "hf", dtype=torch.float32).dtype == torch.float32


def test_resized_embeddings(tmp_path):
    for tied in (True, False):
        ours, model = wrapped(tie_embeddings=tied)
        model.resize_token_embeddings(330)
        ids = ids_of(20)
        logits = model(input_ids=ids).logits
        assert logits.shape[-1] == 330
        torch.testing.assert_close(logits[..., :320], ours(ids), rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path / str(tied))
        again = DualRoutingForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(again(input_ids=ids).logits, logits)


def test_what_cannot_be_done_is_refused():
    _, model = wrapped()
    ids = ids_of(20)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="assisted decoding"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cache_implementation=static"):
        model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="the cache has 1 rows and the call 2"):
        model(input_ids=ids_of(2, batch=2), past_key_values=cache)
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    foreign = transformers.DynamicCache()
    foreign.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(input_ids=ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="max_length=192"):
        model(input_ids=ids_of(193), use_cache=True)


@pytest.mark.slow
def test_damage_is_seen(loaded, tmp_path):
    """In another process, to which no dualroute can be imported."""
    made = loaded()
    folder = tmp_path / "hf"
    folder.mkdir()
    huggingface.write(made, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 0x40
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"logits are off by .*not published"):
        huggingface.verify(made, folder, [])


def test_the_checking_process_cannot_import_the_package():
    load = "import sys, runpy; absent = runpy.run_path(sys.argv[1])['_Absent']; "
    hide = "sys.meta_path.insert(0, absent('dualroute', 'data_prep')); "
    for script, works in ((load + "import json", True), (load + hide + "import dualroute.errors", False)):
        done = subprocess.run(
            [sys.executable, "-I", "-c", script, check_folder.__file__], capture_output=True, text=True
        )
        assert (done.returncode == 0) == works
    assert "No module named 'dualroute" in done.stderr


def test_the_files_of_a_folder(loaded, tmp_path):
    made = loaded()
    huggingface.write(made, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_dualroute.DualRoutingForCausalLM"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    loaded_config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (loaded_config.hidden_size, loaded_config.num_hidden_layers) == (32, 2)
    assert loaded_config.tie_word_embeddings
