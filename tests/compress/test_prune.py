import dataclasses
import json

import pytest
import torch

from dualroute.compress import prune as prune_module
from dualroute.compress.calibration import calibration_batches, loss_on, measure
from dualroute.compress.importance import Kept, Shape, choose, ffn_scores, group_scores
from dualroute.compress.prune import PruneConfig, prune
from dualroute.compress.routing_budget import KeySearch, share_of_keys
from dualroute.compress.routing_need import fit_routing
from dualroute.compress.shapes import Search, Sensitivity, axis_sizes, count, widths_by_need
from dualroute.compress.slicing import slice_model
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import find_checkpoint, load_model, save_model
from dualroute.model.ends_config import TaskHeadConfig
from dualroute.model.foreign.hub import load_dense

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calibrated(trained, tiny_dataset):
    loaded = load(trained, "cpu")
    batches = calibration_batches(loaded, tiny_dataset, 4096, 64, 8, seed=0)
    return loaded.model, batches, measure(loaded.model, batches, CPU)


def everything(model):
    shape = Shape.of(model.config)
    return Kept(
        list(range(shape.num_layers)),
        torch.arange(shape.dim),
        [torch.arange(layer.ffn.down.in_features) for layer in model.layers],
        [torch.arange(shape.global_groups)] * shape.num_layers,
        [torch.arange(shape.local_groups)] * shape.num_layers,
    )


def test_keeping_everything_changes_nothing(calibrated):
    model, batches, statistics = calibrated
    same = slice_model(model, everything(model), statistics)
    assert same.config == model.config
    ids = batches[0]["input_ids"]
    torch.testing.assert_close(same(ids), model(ids))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "dense"},
        {"attention": "local"},
        {"attention": "interleaved", "dense_every": 2},
        {"qk_norm": True, "gate": True, "tie_embeddings": False},
        {"global_layers": [1]},
        {"qkv_bias": True, "global_rotary_factor": 0.0, "local_rotary_factor": 0.5},
        {"layer_windows": [3, 9], "layer_top_k": [1, 2]},
        {"layer_ffn_dims": [24, 32]},
    ],
)
def test_parts_that_do_nothing_can_be_cut_without_a_trace(options):
    """Zero what the chosen groups and channels write: the model without them computes the same."""
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=40, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, ffn_dim=24, window=6,
        block=16, top_k=1, global_mode="routed", **options,
    )  # fmt: skip
    model = DualRoutingTransformer(config).eval()
    kept = dataclasses.replace(
        everything(model),
        ffn=[torch.tensor([0, 3, 4, 5, 9, 20, 21, 23]), torch.tensor([1, 2, 3, 6, 7, 8, 11, 12])],
        global_groups=[torch.tensor([1])[: layer.attention.global_heads] for layer in model.layers],
        local_groups=[torch.tensor([0])[: layer.attention.local_heads] for layer in model.layers],
    )
    if "global_layers" in options:  # a layer without a global route has as many heads as the other one
        kept.local_groups[0] = torch.tensor([0, 2])
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            gone = torch.ones(layer.ffn.down.in_features, dtype=torch.bool)
            gone[kept.ffn[number]] = False
            layer.ffn.down.weight[:, gone] = 0
            columns = layer.attention.out_proj.weight.unflatten(1, (-1, 2 * 4))  # by groups of two heads
            of_global = layer.attention.global_heads // 2
            for group in range(columns.shape[1]):
                stays = (
                    kept.global_groups[number] if group < of_global else kept.local_groups[number] + of_global
                )
                if group not in stays.tolist():
                    columns[:, group] = 0
            for name, parameter in layer.attention.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
            if layer.attention.gate_weight is not None:
                layer.attention.gate_weight.normal_()
    small = slice_model(model, kept, None)
    ids = torch.randint(40, (2, 70))
    torch.testing.assert_close(small(ids), model(ids), atol=1e-5, rtol=1e-4)
    assert small.num_parameters() < model.num_parameters()
    assert small.config.num_heads == (4 if config.attention == "dual" else 2)


def test_residual_channels_that_are_always_zero_can_go(calibrated):
    model, batches, _ = calibrated
    torch.manual_seed(0)
    model = DualRoutingTransformer(model.config).eval()
    dead = [1, 5, 30]
    with torch.no_grad():
        model.embedding.weight.mul_(50)  # so that the norms' epsilon does not count
        model.embedding.weight[:, dead] = 0
        for layer in model.layers:
            layer.attention.out_proj.weight[dead] = 0
            layer.ffn.down.weight[dead] = 0
    statistics = measure(model, batches, CPU)
    kept = choose(model, statistics, dataclasses.replace(Shape.of(model.config), dim=29), "activation")
    assert not set(kept.channels.tolist()) & set(dead)
    ids = batches[0]["input_ids"]
    # the norms divide by the mean over fewer channels: their weights make up for it
    torch.testing.assert_close(slice_model(model, kept, statistics)(ids), model(ids), atol=1e-5, rtol=1e-4)


def test_importance_beats_random_and_refitting_beats_cutting(calibrated):
    model, batches, statistics = calibrated
    shape = dataclasses.replace(Shape.of(model.config), ffn_dim=16)

    def loss(criterion, seed, compensate):
        kept = choose(model, statistics, shape, criterion, seed)
        return loss_on(slice_model(model, kept, statistics if compensate else None), batches, CPU)

    chosen = loss("activation", 0, False)
    assert chosen < min(loss("random", seed, False) for seed in range(3))
    assert loss("activation", 0, True) < chosen


def test_statistics_are_means_over_tokens_that_are_there(calibrated):
    model, batches, statistics = calibrated
    seen = []
    hook = model.layers[1].ffn.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "segment_ids", "positions")}
            model.hidden_states(**inputs)
            seen[-1] = seen[-1][batch["segment_ids"] != 0]
    hook.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(statistics.layers[1].ffn_gram, rows.T @ rows / len(rows), atol=1e-6, rtol=1e-3)
    expected = rows.square().mean(0).sqrt() * model.layers[1].ffn.down.weight.norm(dim=0)
    torch.testing.assert_close(ffn_scores(model, statistics, 1), expected, atol=1e-6, rtol=1e-3)


def test_scores_of_groups_are_what_they_add(calibrated):
    model, batches, statistics = calibrated
    attention, seen = model.layers[0].attention, []
    hook = attention.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model.hidden_states(**{key: batch[key] for key in ("input_ids", "segment_ids", "positions")})
            seen[-1] = seen[-1][batch["segment_ids"] != 0]
    hook.remove()
    rows = torch.cat(seen)
    second = slice(16, 32)  # two heads of 8 channels share a key head
    added = rows[:, second] @ attention.out_proj.weight[:, second].T
    of_global, of_local = group_scores(model, statistics, 0)
    assert len(of_global) == len(of_local) == 2
    torch.testing.assert_close(of_global[1], added.square().sum(1).mean().sqrt(), atol=1e-6, rtol=1e-3)


# -- shapes


@pytest.mark.parametrize("attention", ["dual", "dense", "interleaved"])
@pytest.mark.parametrize("target", ["parameters", "flops"])
def test_quick_counts_are_the_models_own(attention, target):
    config = ModelConfig(
        vocab_size=100, dim=64, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=128,
        attention=attention, dense_every=3, global_mode="routed", block=16, window=16, top_k=2,
    ).resolved()  # fmt: skip
    search = Search(
        config, dict.fromkeys(["dim", "ffn", "heads"], Sensitivity([0.0, 1.0], [1.0, 0.0])), 16, 512, CPU
    )
    counted = search._counter(target)
    for shape in list(search._shapes())[::23]:
        assert counted(shape) == pytest.approx(count(config, shape, target, 512), rel=1e-9)


def test_the_search_takes_from_the_cheapest_axis():
    config = ModelConfig(vocab_size=100, dim=128, num_layers=4, num_heads=4, ffn_dim=512).resolved()
    dear, cheap = Sensitivity([0.5, 1.0], [2.0, 0.0]), Sensitivity([0.5, 1.0], [0.01, 0.0])
    best = Search(config, {"dim": dear, "ffn": cheap}, 64, 512, CPU).best("parameters", 0.7)
    assert best.dim == 128
    parameters = count(config, best, "parameters", 512)
    assert parameters <= 0.7 * count(config, Shape.of(config), "parameters", 512)
    assert best.ffn_dim % 64 == 0
    # nothing larger would do
    larger = dataclasses.replace(best, ffn_dim=best.ffn_dim + 64)
    assert count(config, larger, "parameters", 512) > 0.7 * count(config, Shape.of(config), "parameters", 512)


def test_an_impossible_target_says_what_is_possible():
    config = ModelConfig(vocab_size=100, dim=128, num_layers=4, num_heads=4, ffn_dim=512).resolved()
    search = Search(config, {"ffn": Sensitivity([0.0, 1.0], [1.0, 0.0])}, 64, 512, CPU)
    with pytest.raises(UserError, match=r"cannot be reached by the axes ffn: the smallest shape has 0\.\d\d"):
        search.best("parameters", 0.1)


@pytest.mark.slow
def test_latency_is_measured():
    config = ModelConfig(vocab_size=64, dim=128, num_layers=6, num_heads=4, ffn_dim=512).resolved()
    search = Search(config, {"layers": Sensitivity([0.0, 1.0], [1.0, 0.0])}, 64, 256, CPU)
    assert search.best("latency", 0.7).num_layers < 6


def test_heads_leave_in_whole_groups_from_both_routes():
    shape = Shape(2, 64, 128, global_groups=4, local_groups=2)
    sizes = [(one.global_groups, one.local_groups) for one in axis_sizes(shape, "heads", 64)]
    assert sizes == [(4, 2), (3, 1), (2, 1), (1, 1)]


# -- the command


def options(trained, tiny_dataset, output, **values):
    standard = {"calibration_tokens": 2048, "multiple": 16, "batch_size": 8, "device": "cpu"}
    return PruneConfig(str(trained), str(output), str(tiny_dataset), **{**standard, **values})


def test_a_pruned_checkpoint_is_an_ordinary_one(trained, tiny_dataset, tmp_path, capsys):
    prune(
        options(trained, tiny_dataset, tmp_path / "small", keep=0.67, fit_routing=True, routing_tolerance=0.1)
    )
    small = load_model(find_checkpoint(tmp_path / "small"))
    parent = load_model(find_checkpoint(trained))
    account = json.loads((tmp_path / "small" / "prune.json").read_text())
    assert small.num_parameters() == account["parameters"]["pruned"] <= 0.67 * parent.num_parameters()
    assert account["loss"]["parent"] < account["loss"]["pruned"]
    assert account["loss"]["with fitted routing"] <= account["loss"]["pruned"] + 0.1
    assert {axis for axis, rows in account["axes"].items() if rows} == {"dim", "ffn", "heads"}
    assert small.config.layer_windows == account["routing"]["windows"]
    assert "calibration loss" in capsys.readouterr().out


def test_what_was_measured_for_a_latency_is_told(trained, tiny_dataset, tmp_path, capsys, monkeypatch):
    """A clock that counts FLOPs: nanoseconds of a tiny model say little."""
    for module in ("prune", "shapes"):
        name = f"dualroute.compress.{module}.latency"
        monkeypatch.setattr(name, lambda config, shape, *_: count(config, shape, "flops", 64))
    target = {"target": "latency", "keep": 0.7, "axis_report": False}
    prune(options(trained, tiny_dataset, tmp_path / "small", **target))
    account = json.loads((tmp_path / "small" / "prune.json").read_text())
    assert account["forward_ms"]["pruned"] <= 0.7 * account["forward_ms"]["parent"]
    assert "forward ms" in capsys.readouterr().out


def test_given_sizes_are_taken_and_the_rest_is_searched(trained, tiny_dataset, tmp_path):
    prune(options(trained, tiny_dataset, tmp_path / "a", num_layers=2, global_heads=2))
    config = load_model(find_checkpoint(tmp_path / "a")).config
    assert (config.num_layers, config.global_heads, config.local_heads, config.num_heads) == (2, 2, 4, 6)
    prune(options(trained, tiny_dataset, tmp_path / "b", keep=0.7, dim=32, axis_report=False))
    config = load_model(find_checkpoint(tmp_path / "b")).config
    assert config.dim == 32
    assert config.ffn_dim < 64


def test_the_shape_of_another_is_taken_whole(trained, tiny_dataset, tmp_path):
    prune(options(trained, tiny_dataset, tmp_path / "a", ffn_dim=48, local_heads=2))
    shape = str(tmp_path / "a")
    prune(options(trained, tiny_dataset, tmp_path / "b", shape_of=shape, criterion="random"))
    first, second = (load_model(find_checkpoint(tmp_path / name)) for name in "ab")
    assert first.config == second.config
    assert not torch.equal(first.layers[0].ffn.up.weight, second.layers[0].ffn.up.weight)
    with pytest.raises(UserError, match="is larger than the model in ffn_dim, local_groups"):
        prune(options(tmp_path / "a", tiny_dataset, tmp_path / "c", shape_of=str(trained)))


def test_widths_go_where_their_loss_is():
    flat, steep = Sensitivity([0.25, 0.5, 1.0], [0.1, 0.0, 0.0]), Sensitivity([0.5, 1.0], [3.0, 0.0])
    assert widths_by_need([steep, flat], [64, 64], 96, 16) == [64, 32]
    assert widths_by_need([steep, flat], [64, 64], 80, 16) == [64, 16]
    assert widths_by_need([steep, flat], [64, 40], 64, 16) == [48, 16]  # no narrower than one multiple
    assert widths_by_need([flat, flat], [64, 64], 128, 16) == [64, 64]


def test_layers_get_feed_forwards_of_their_own_width(trained, tiny_dataset, tmp_path, capsys, monkeypatch):
    """A quarter of all channels goes, and one layer's write nothing: all of the cut is theirs."""
    measured = prune_module._costs_by_layer

    def costs_by_layer(*arguments):
        """Measured; in a model so small the others' channels may do harm by chance, which is a cost here."""
        return [
            dataclasses.replace(cost, losses=list(map(abs, cost.losses))) for cost in measured(*arguments)
        ]

    monkeypatch.setattr(prune_module, "_costs_by_layer", costs_by_layer)
    checkpoint = find_checkpoint(trained)
    parent = load_model(checkpoint)
    with torch.no_grad():
        parent.layers[1].ffn.down.weight.zero_()
    save_model(parent, tmp_path / "parent", checkpoint.folder / "tokenizer.model", checkpoint.metadata)
    assert (parent.config.num_layers, parent.config.ffn_dim) == (3, 64)
    asked = {"ffn_dim": 48, "ffn_by_layer": True}
    prune(options(tmp_path / "parent", tiny_dataset, tmp_path / "small", **asked))
    account = json.loads((tmp_path / "small" / "prune.json").read_text())
    widths = account["ffn_by_layer"]["widths"]
    assert account["ffn_by_layer"]["costs"][1]["losses"] == [0.0] * 4
    assert widths == [64, 16, 64]
    assert f"feed-forwards {widths}, by layer" in capsys.readouterr().out
    small = load_model(find_checkpoint(tmp_path / "small"))
    assert small.config.layer_ffn_dims == widths
    assert [layer.ffn.up.out_features for layer in small.layers] == widths
    ids = torch.randint(3, 60, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(small(ids), parent(ids), rtol=1e-4, atol=1e-4)
    assert count(small.config, Shape.of(small.config), "parameters", 64) == small.num_parameters()

    shape = {"shape_of": str(tmp_path / "small"), "criterion": "random"}
    prune(options(tmp_path / "parent", tiny_dataset, tmp_path / "control", **shape))
    assert load_model(find_checkpoint(tmp_path / "control")).config == small.config
    with pytest.raises(UserError, match=r"widths of their own .* give --ffn_by_layer true"):
        prune(options(tmp_path / "small", tiny_dataset, tmp_path / "again", ffn_dim=16))
    prune(options(tmp_path / "small", tiny_dataset, tmp_path / "heads", local_heads=2))
    assert load_model(find_checkpoint(tmp_path / "heads")).config.layer_ffn_dims == widths


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to prune"),
        ({"shape_of": "x", "keep": 0.5}, "shape_of gives all sizes"),
        ({"keep": 1.5}, r"keep is 1.5: it must be in \(0, 1\)"),
        ({"keep": 0.5, "axes": []}, "axes is empty"),
        ({"ffn_dim": 24}, "ffn_dim is 24: it must be at most 64 and a multiple of 16"),
        ({"global_heads": 3}, "global_heads is 3: it must be at most 4 and a multiple of 2"),
        ({"keep": 0.01}, "cannot be reached"),
        ({"ffn_dim": 32, "context": 4096}, "longer than the model's max_context 128"),
        ({"ffn_dim": 32, "data": "nowhere"}, "nowhere.*no such file"),
        ({"ffn_dim": 32, "checkpoint": "nowhere"}, "no checkpoint at nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused(trained, tiny_dataset, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        prune(
            options(
                values.pop("checkpoint", trained), values.pop("data", tiny_dataset), tmp_path / "x", **values
            )
        )
    assert not (tmp_path / "x").exists()


def test_a_quantised_checkpoint_is_refused(trained, tiny_dataset, tmp_path):
    model = load_model(find_checkpoint(trained))
    said = {"quantization": {"scheme": "int8_weight_only"}}
    save_model(model, tmp_path / "int8", tiny_dataset / "tokenizer.model", said)
    with pytest.raises(UserError, match=r"int8 is quantized \(int8_weight_only\): only floats are pruned"):
        prune(options(tmp_path / "int8", tiny_dataset, tmp_path / "x", ffn_dim=32))
    with pytest.raises(UserError, match="floats are needed here"):
        load_dense(tmp_path / "int8")


def test_the_head_of_a_task_is_kept_and_such_a_model_is_not_pruned_by_another_loss(
    trained, tiny_dataset, tmp_path
):
    vocabulary = load(str(trained), "cpu").tokenizer
    config = ModelConfig(
        vocab_size=vocabulary.vocab_size, dim=16, num_layers=1, num_heads=2, ffn_dim=16, block=16,
        task_head=TaskHeadConfig("sequence", ["no", "yes"]),
    )  # fmt: skip
    model = DualRoutingTransformer(config)
    torch.nn.init.normal_(model.task_head.project.bias)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(slice_model(model, everything(model), None)(ids), model(ids))
    save_model(model, tmp_path / "task", vocabulary.path, {"context": 64})
    with pytest.raises(UserError, match=r"was not trained for a task \(it has no task\.json\)"):
        prune(options(tmp_path / "task", tiny_dataset, tmp_path / "x", ffn_dim=16))


def test_an_output_that_exists_is_left_alone(trained, tiny_dataset):
    with pytest.raises(UserError, match="exists already"):
        prune(options(trained, tiny_dataset, trained, ffn_dim=32))


@pytest.mark.slow
def test_each_layer_gets_what_it_needs(calibrated):
    model, batches, _ = calibrated
    fitted, need = fit_routing(load_copy(model), batches, CPU, tolerance=0.01)
    start = loss_on(model, batches, CPU)
    assert need.loss <= start + 0.01
    assert loss_on(fitted, batches, CPU) == pytest.approx(need.loss, abs=1e-6)
    assert all(window <= 32 for window in need.windows)
    assert fitted.config.layer_top_k == need.top_k
    # with all the loss in the world everything shrinks as far as it may
    _, least = fit_routing(load_copy(model), batches, CPU, tolerance=100.0)
    assert least.windows == [16, 16, 16]
    assert least.top_k == [1, 1, 1]


@pytest.mark.slow
def test_windows_and_top_k_under_a_budget_of_keys(trained, tiny_dataset, tmp_path, capsys):
    out = tmp_path / "out"
    how = {"calibration_tokens": 1024, "context": 64, "batch_size": 4, "device": "cpu"}
    prune(options(trained, tiny_dataset, out, keys=0.75, **how))
    parent, fitted = load(trained, "cpu").model, load(out, "cpu").model
    share = share_of_keys(fitted.config, 64) / share_of_keys(parent.config, 64)
    account = json.loads((find_checkpoint(out).folder / "prune.json").read_text())
    assert account["keys"]["read"] == pytest.approx(share)
    assert share <= 0.75
    assert f"a token reads {share:.3f} of the keys" in capsys.readouterr().out
    assert fitted.config.global_layers == parent.config.global_layers  # routes stay
    assert account["routing"]["windows"] == fitted.config.layer_windows
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, fitted.state_dict()[name])
    with pytest.raises(UserError, match=r"--keys 0.001: .* of the keys of 64 tokens: give a larger --keys"):
        prune(options(trained, tiny_dataset, tmp_path / "none", keys=0.001, **how))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="give one of them"):
        options(trained, tiny_dataset, out, keys=0.5, fit_routing=True)


@torch.no_grad()
def test_the_budget_of_layers_that_share_a_choice_is_met_by_windows():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, dim=16, num_layers=2, num_heads=2, window=32, block=8, sub_block=8, top_k=2,
        global_mode="routed", share_choice=2, max_context=64,
    )  # fmt: skip
    batches = [{"input_ids": torch.randint(40, (2, 64))}]
    search = KeySearch(DualRoutingTransformer(config).eval(), batches, 64, CPU)
    found = search.within(0.85)
    assert found.config.layer_top_k == [2, 2]
    assert min(found.config.layer_windows) < 32
    assert found.divergence == pytest.approx(search.divergence())


def load_copy(model):
    copy = DualRoutingTransformer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()
