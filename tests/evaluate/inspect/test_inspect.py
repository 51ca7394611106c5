"""The numbers of an inspection are those of the formulas, and the page shows them."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dualroute.attention import reference
from dualroute.errors import UserError
from dualroute.evaluate.inspect.ablation import Ablation, switched_off
from dualroute.evaluate.inspect.command import inspect_command
from dualroute.evaluate.inspect.config import InspectConfig
from dualroute.evaluate.inspect.numbers import inspect_ids
from dualroute.evaluate.inspect.page import page
from dualroute.evaluate.inspect.weights import FAR, IN_FULL, KINDS, OWN, SELECTED, SINK, global_weights
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.steering import attentions, steer

LENGTH = 75  # four blocks of 16 and a part of one
IDS = torch.randint(40, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def model_of(**changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": 40, "dim": 32, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "max_context": 128,
        "window": 8, "block": 16, "sub_block": 4, "top_k": 1, "global_mode": "routed", "gate": True,
    }  # fmt: skip
    model = DualRoutingTransformer(ModelConfig(**(values | changes))).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def captured(model):
    """(layer, input, layout, choice, output) of each attention."""
    from dualroute.evaluate.inspect.numbers import _attention_inputs

    return _attention_inputs(model, torch.tensor([IDS]))[0]


@torch.no_grad()
@pytest.mark.parametrize("far", ["second_order", "first_order", "none"])
@pytest.mark.parametrize("router", ["minmax", "moment"])
def test_weights_give_the_outputs_of_the_formula(far, router):
    layer, hidden, layout, _, _ = captured(model_of(far_summary=far, router=router))[1]
    rows = layer.stream_heads(layer.global_qkv, layer.global_rope, hidden, layout, None, False)
    found = global_weights(layer, *rows, LENGTH)
    text = [part[:, :LENGTH] for part in rows]
    how = {"block": 16, "top_k": 1, "router": router, "sub_block": 4}
    expected = reference.routed(*text, far_summary=far, **how)
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-10)
    chosen = reference.select(text[0], text[1], **how).repeat_interleave(layer.group, 0)
    assert torch.equal(found.kinds == SELECTED, chosen)
    sums = found.keys.sum(-1) + found.far.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.full @ text[2].repeat_interleave(2, 0), reference.full(*text))


@pytest.mark.parametrize(
    "changes",
    [{}, {"global_mode": "full"}, {"attention": "dense"}, {"attention": "local"}, {"qk_norm": True}],
)
def test_the_numbers_fit_the_model_and_each_other(changes):
    model = model_of(**changes)
    steer(model, "" if "attention" in changes else "global.0.1=0.5")
    found = inspect_ids(model, IDS, [str(number) for number in IDS], ablations=("routes", "layers"))
    assert len(found.tokens) == len(found.ids) == LENGTH
    for layer in found.layers:
        assert layer.difference < 1e-10
        np.testing.assert_allclose(layer.shares.sum(0), 1, rtol=1e-5)
        np.testing.assert_allclose(layer.window_weights.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(layer.block_weights.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(layer.full_block_weights.sum(-1), 1, rtol=1e-5)
        far = (layer.block_weights * (layer.kinds == FAR)).sum(-1)
        np.testing.assert_allclose(layer.far_mass, far, atol=1e-6)
        kinds = {} if changes else {OWN, SINK, SELECTED, FAR}
        assert kinds <= set(layer.kinds.flat) if kinds else IN_FULL not in layer.kinds or not far.any()
        for head, row, m in zip(*np.nonzero(layer.missed_weights > 1e-3), strict=True):
            missed = layer.missed_tokens[head, row, m]
            assert layer.kinds[head, row, missed // 16] == FAR
    targets = torch.tensor(IDS[1:])
    expected = torch.nn.functional.cross_entropy(
        model(torch.tensor([IDS]))[0, :-1], targets, reduction="none"
    )
    np.testing.assert_allclose(found.losses, expected.detach().numpy(), rtol=1e-5)


@torch.no_grad()
def test_what_is_switched_off_is_what_changes():
    model = model_of()
    found = inspect_ids(model, IDS, [""] * LENGTH)
    names = [what.name for what in found.ablations]
    assert names[:2] == ["global.*", "local.*"]
    assert len(names) == 2 + 2 * 2 + 2 * 8 + 2 + 4
    logits = model(torch.tensor([IDS]))[0].log_softmax(-1)
    for name in ("global.1", "local.0.2"):
        steer(model, f"{name}=0")
        without = model(torch.tensor([IDS]))[0].log_softmax(-1)
        steer(model, "")
        expected = (logits.exp() * (logits - without)).sum(-1)
        np.testing.assert_allclose(found.kl[names.index(name)], expected.numpy(), atol=1e-5)
        change = torch.nn.functional.nll_loss(without[:-1], torch.tensor(IDS[1:]), reduction="none")
        np.testing.assert_allclose(
            found.loss_change[names.index(name)], change.numpy() - found.losses, atol=1e-5
        )
    of_block = found.kl[names.index("block 2")]
    assert np.all(of_block[:48] < 1e-12)  # no token before its end is changed
    assert of_block[48:].max() > 1e-6
    torch.testing.assert_close(model(torch.tensor([IDS]))[0].log_softmax(-1), logits, rtol=0, atol=0)


@torch.no_grad()
def test_a_block_that_is_off_is_read_by_nobody():
    """Its keys and values may be anything."""
    layer, hidden, layout, _, _ = captured(model_of())[0]
    rows = layer.stream_heads(layer.global_qkv, layer.global_rope, hidden, layout, None, False)
    without = global_weights(layer, *rows, LENGTH, off=1)
    key, value = rows[1].clone(), rows[2].clone()
    key[:, 16:32] += 5
    value[:, 16:32] -= 7
    other = global_weights(layer, rows[0], key, value, LENGTH, off=1)
    assert torch.equal(without.outputs[:, 32:], other.outputs[:, 32:])
    assert not torch.equal(without.outputs[:, 16:32], other.outputs[:, 16:32])


def test_a_switch_is_put_back_after_an_error():
    model = model_of()
    steer(model, "global.0.0=0.5")
    for what in (Ablation("head", "global.0.1"), Ablation("block", "block 0"), Ablation("layer", "layer 1")):
        with pytest.raises(ZeroDivisionError), switched_off(model, what):
            raise ZeroDivisionError
    assert attentions(model)[0].head_scale.tolist() == [0.5] + [1] * 7
    assert "_global" not in attentions(model)[0].__dict__
    assert not model.layers[1]._forward_hooks


def numbers_of(text):
    return json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def shown():
    tokens = [f"{number} " for number in IDS]
    tokens[20] = "</script><script>alert(1)</script>\u2028&"
    found = inspect_ids(model_of(), IDS, tokens, ablations=("routes", "blocks"))
    return found, page(found, "<b>a model</b>")


def test_the_page_holds_the_numbers_and_no_text_can_leave_its_place(shown):
    found, text = shown
    table = numbers_of(text)
    assert table["tokens"] == found.tokens
    assert text.count("</script>") == 2
    assert "<b>a model" not in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched
    for layer, held in zip(found.layers, table["layers"], strict=True):
        raw = np.frombuffer(base64.b64decode(held["block_weights"]), "<u2") / 65535
        np.testing.assert_allclose(raw.reshape(layer.block_weights.shape), layer.block_weights, atol=1e-5)
    kl = np.frombuffer(base64.b64decode(table["kl"]), "<f4").reshape(found.kl.shape)
    np.testing.assert_array_equal(kl, found.kl)


def test_pointing_at_a_token_shows_its_blocks(shown, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page is not looked at")
    found, text = shown
    pointing = (
        "<script>document.getElementById('layer').value = 1;"
        "document.getElementById('layer').dispatchEvent(new Event('change'));"
        "document.getElementById('t70').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{pointing}</body>"))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    result = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    rows = dict(re.findall(r'data-block="(\d+)" data-weight="([\d.]+)"', result.stdout))
    expected = found.layers[1].block_weights[:, 70].mean(0)
    assert {int(block): float(weight) for block, weight in rows.items()} == pytest.approx(
        {block: weight for block, weight in enumerate(expected.tolist()) if weight >= 0.001}, abs=1e-3
    )
    assert f"token 70: {found.tokens[70]}" in result.stdout
    assert "global.*" in result.stdout


def test_the_command_writes_a_page(checkpoint, tmp_path, capsys):
    output = tmp_path / "page.html"
    config = InspectConfig(
        str(checkpoint), "the old bird <script> é中 " * 9, str(output), max_tokens=50, ablations=["blocks"],
        scale="local.1=0",
    )  # fmt: skip
    inspect_command(config)
    said = capsys.readouterr().out
    assert "the first 50 are shown (max_tokens 50)" in said
    table = numbers_of(output.read_text())
    assert len(table["tokens"]) == 50
    assert table["notes"][1] == "Scaled: local.1=0"
    assert table["kinds"] == list(KINDS)
    assert not list(Path(tmp_path).glob("*.tmp*"))
    with pytest.raises(UserError, match="there is no folder"):
        inspect_command(InspectConfig(str(checkpoint), "a", str(tmp_path / "no" / "page.html")))


def test_what_cannot_be_inspected_is_refused():
    with pytest.raises(UserError, match="1 tokens, and 2 to 128 can"):
        inspect_ids(model_of(), [1], ["a"])
    with pytest.raises(UserError, match="causal"):
        inspect_ids(model_of(causal=False), IDS, [""] * LENGTH)
    broken = model_of()
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        inspect_ids(broken, IDS, [""] * LENGTH)
