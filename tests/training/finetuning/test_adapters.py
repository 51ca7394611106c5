"""LoRA and DoRA: what is trained, what is published, and what peft makes of it elsewhere."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from dualroute.compat import compile_regions
from dualroute.errors import UserError
from dualroute.export.hf.folder import named_weights
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import replace_parameter
from dualroute.training.finetuning.adapters import adapter_files, add_adapters, merged_parameters, targets
from dualroute.training.finetuning.config import StrategyConfig
from dualroute.training.finetuning.deferred import add_deferred_adapters
from dualroute.training.finetuning.patterns import unties_head
from dualroute.training.parallel.sharded_weights import InitialWeights
from dualroute.training.step.fp8 import multiply_in_fp8
from dualroute.training.step.quantization_aware import round_weights_in_forward

ALL = {"global_qkv", "local_qkv", "out_proj", "gate", "up", "down"}


def build(tie: bool = False, **more: object) -> DualRoutingTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, dim=32, num_layers=2, num_heads=4, window=8, block=16, tie_embeddings=tie,
        qkv_bias=True, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return DualRoutingTransformer(config)


def adapted(kind: str, **more: object) -> DualRoutingTransformer:
    """With adapters that have an effect."""
    model = build()
    add_adapters(model, StrategyConfig(adapter=kind, rank=4, **more), seed=1)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def merged(model: DualRoutingTransformer) -> DualRoutingTransformer:
    plain = build()
    plain.load_state_dict({name: value() for name, _, value in merged_parameters(model)})
    return plain


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_begin_without_effect_and_are_all_that_is_trained(kind: str) -> None:
    model, ids = build(), torch.randint(50, (2, 30))
    before = {name: value.clone() for name, value in model.named_parameters()}
    add_adapters(model, StrategyConfig(adapter=kind, rank=4), seed=1)  # type: ignore[arg-type]
    torch.testing.assert_close(model(ids), build()(ids), rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    ends = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert ends == ALL | {"head"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(ids).square().mean().backward()
        optimizer.step()
    after = {name: value() for name, _, value in merged_parameters(model)}
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    linear = {name for name in before if name.split(".")[-2] in ALL | {"head"} and name.endswith(".weight")}
    assert moved == linear
    untouched = dict(model.named_parameters())
    assert all(
        torch.equal(untouched[name.replace(".weight", ".base_layer.weight")], before[name]) for name in linear
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_published_is_the_model_with_its_adapters(kind: str) -> None:
    model, ids = adapted(kind).eval(), torch.randint(50, (2, 30))
    torch.testing.assert_close(merged(model)(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert (model(ids) - build()(ids)).abs().max() > 1e-3


def test_the_first_draw_follows_from_the_seed_alone() -> None:
    drawn = []
    for before in (3, 4):
        model = build()
        torch.manual_seed(before)
        add_adapters(model, StrategyConfig(adapter="lora"), seed=7)
        drawn.append(model.get_parameter("layers.0.ffn.up.lora_A.default.weight"))
    assert torch.equal(*drawn)


def test_layers_are_chosen_by_name_or_pattern() -> None:
    assert {name.rpartition(".")[2] for name in targets(build(), ["all"])} == ALL | {"head"}
    assert {name.rpartition(".")[2] for name in targets(build(tie=True), ["all"])} == ALL
    assert targets(build(), ["layers.1.ffn"]) == [f"layers.1.ffn.{name}" for name in ("gate", "up", "down")]
    assert len(targets(build(), ["*_qkv"])) == 4
    with pytest.raises(UserError, match=r"'q_proj' names no linear layer; there are down, gate, global_qkv"):
        targets(build(), ["q_proj"])
    assert unties_head(["layers.*", "head"], build(tie=True).config)
    assert not unties_head(["all"], build(tie=True).config)
    assert not unties_head(["head"], build().config)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_computes_what_peft_computes(dropout: float) -> None:
    model, rows = adapted("dora", dropout=dropout), torch.randn(2, 5, 32)
    layer = model.get_submodule("layers.1.attention.local_qkv")
    found, gradients = [], []
    for kind in (type(layer), peft.tuners.lora.Linear):
        if kind is not type(layer):
            layer.__class__ = kind
            for inner in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
                inner.__class__ = torch.nn.Linear
            length = layer.lora_magnitude_vector["default"]
            length.__class__ = type(length).__bases__[1]
        torch.manual_seed(3)
        found.append(layer(rows))
        layer.zero_grad()
        found[-1].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rounded_in_training_it_is_the_published_model_rounded(kind: str) -> None:
    """What is quantised later is the sum, so the sum is what is rounded; gradients pass to the adapter."""
    for scheme, group in (("int8_weight_only", 0), ("int4_weight_only", 8)):
        model, ids = adapted(kind), torch.randint(50, (2, 30))
        plain = merged(model)
        round_weights_in_forward(plain, scheme, group)
        round_weights_in_forward(model, scheme, group)
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-5, atol=1e-5)
        model(ids).square().mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        assert torch.equal(merged(model).head.weight, merged(adapted_again(model)).head.weight)


def adapted_again(model: DualRoutingTransformer) -> DualRoutingTransformer:
    """The adapters of ``model`` without rounding."""
    other = build()
    add_adapters(other, model.adapter_config, seed=1)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_compiler_takes_a_layer_with_its_adapter_whole(kind: str) -> None:
    compile_regions()  # as a training does
    layer, rows = adapted(kind).get_submodule("layers.0.attention.local_qkv"), torch.randn(3, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)  # a break in the graph is an error
    torch.testing.assert_close(compiled(rows), layer(rows))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fp8_takes_the_weights_beneath_and_leaves_the_thin_ones(kind: str) -> None:
    model = adapted(kind)
    multiply_in_fp8(model)
    taken = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert taken == {f"{name}.base_layer" for name in targets(build(), ["all"]) if name != "head"}
    ids = torch.randint(50, (2, 32))
    exact = merged(model)(ids)
    assert 0 < (model(ids) - exact).norm() < 0.1 * exact.norm()
    model(ids).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_a_model_without_weights_are_those_of_one_with_them(kind: str) -> None:
    config = StrategyConfig(adapter=kind, rank=4)  # type: ignore[arg-type]
    whole = build()
    given = dict(whole.named_parameters())
    weights = InitialWeights(list(given), lambda: iter((n, p.detach()) for n, p in given.items()))
    with torch.device("meta"):
        later = build()
    named = add_deferred_adapters(later, config, 1, weights)
    add_adapters(whole, config, seed=1)
    assert named.tensors is not None
    for name, value in named.tensors():
        replace_parameter(later, name, torch.nn.Parameter(value))
    theirs = dict(later.named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(theirs[name], parameter), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("chosen", [["all"], ["layers.1.*"]], ids=["all", "one layer"])
def test_peft_reads_the_adapter_on_the_exported_model(kind: str, chosen: list[str], tmp_path: Path) -> None:
    from dualroute.export.hf.configuration_dualroute import DualRoutingConfig
    from dualroute.export.hf.modeling_dualroute import DualRoutingForCausalLM

    model, ids = adapted(kind, targets=chosen).eval(), torch.randint(50, (2, 30))
    for name, content in adapter_files(model).items():
        (tmp_path / Path(name).name).write_bytes(content)
    base = build()
    exported = DualRoutingForCausalLM(DualRoutingConfig(base.config.to_dict()))
    exported.load_state_dict(named_weights(base))
    ours = peft.PeftModel.from_pretrained(exported, tmp_path).eval()
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "default" in name]
    torch.testing.assert_close(ours(ids).logits, merged(model)(ids), rtol=1e-4, atol=1e-5)
