import pytest
import torch

from dualroute.compress.calibration import calibration_batches, measure
from dualroute.compress.sparsify import SparsifyConfig, sparsify, zero_weights
from dualroute.errors import UserError
from dualroute.evaluate.load import load
from dualroute.model.checkpoint.format import find_checkpoint, load_model

CPU = torch.device("cpu")


def zeros(model):
    """{projection: (out, in) whether a weight is 0}."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: linear.weight == 0 for name, linear in linears.items()}


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_half_of_every_row_becomes_zero(trained, tiny_dataset, tmp_path, method, pattern):
    output = tmp_path / "sparse"
    sparsify(
        SparsifyConfig(str(trained), str(output), str(tiny_dataset), method, 0.5, pattern, 2048, device="cpu")
    )
    model = load_model(find_checkpoint(output))
    for name, zero in zeros(model).items():
        assert (zero.sum(1) == zero.shape[1] // 2).all(), name
        if pattern == "2:4":
            assert (zero.unflatten(1, (-1, 4)).sum(2) == 2).all(), name
    assert not (model.embedding.weight == 0).any()


def test_wanda_is_not_misled_by_the_scale_of_inputs(trained, tiny_dataset):
    """FFN channels of very different size, the same function: magnitude takes large weights for important."""
    scales = 10 ** torch.empty(64).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    errors = {}
    for method in ("wanda", "magnitude"):
        loaded = load(trained, "cpu")
        batches = calibration_batches(loaded, tiny_dataset, 4096, 64, 8, seed=0)
        down = loaded.model.layers[0].ffn.down
        with torch.no_grad():
            loaded.model.layers[0].ffn.up.weight.mul_(scales[:, None])
            down.weight.div_(scales)
        statistics = measure(loaded.model, batches, CPU)
        before = down.weight.clone()
        zero_weights(loaded.model, statistics if method == "wanda" else None, 0.5, "unstructured")
        change = before - down.weight
        # E‖ΔW a‖², what the projection's output is off by
        errors[method] = (change @ statistics.layers[0].ffn_gram * change).sum()
    assert errors["wanda"] < 0.5 * errors["magnitude"]


def test_contradictions_are_refused(trained, tiny_dataset, tmp_path):
    with pytest.raises(UserError, match=r"2:4 is always 0\.5"):
        SparsifyConfig("a", "b", "c", sparsity=0.7, pattern="2:4")
    with pytest.raises(UserError, match=r"sparsity is 1\.0"):
        SparsifyConfig("a", "b", "c", sparsity=1.0)
    with pytest.raises(UserError, match="exists already"):
        sparsify(SparsifyConfig(str(trained), str(trained), str(tiny_dataset)))
