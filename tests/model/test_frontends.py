"""What enters a model instead of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.model.config import ModelConfig
from dualroute.model.ends_config import FrontendConfig, TaskHeadConfig
from dualroute.model.frontends import Frontend, patches_of

SHAPE: dict[str, Any] = {"vocab_size": 8, "dim": 16, "num_layers": 2, "num_heads": 4, "causal": False}
IMAGES: dict[str, Any] = {"block": 4, "sub_block": 2, "window": 2, "top_k": 1, "global_mode": "routed"}


def model(frontend: FrontendConfig, **options: Any) -> DualRoutingTransformer:
    torch.manual_seed(0)
    head = TaskHeadConfig("sequence", ["a", "b"], "mean")
    config = ModelConfig(**{**SHAPE, **options}, frontend=frontend, task_head=head)
    return DualRoutingTransformer(config).double()


def image_model(**options: Any) -> DualRoutingTransformer:
    return model(FrontendConfig("patches", 12, [5, 4], [2, 2], **options), **IMAGES)


def test_patches_are_cut_in_raster_order_and_filled_up_at_the_edges() -> None:
    image = np.arange(5 * 7 * 2).reshape(5, 7, 2)
    patches = patches_of(image, 3)
    assert patches.shape == (6, 18)
    for number in range(6):
        row, column = divmod(number, 3)
        part = image[row * 3 : row * 3 + 3, column * 3 : column * 3 + 3]
        square = patches[number].reshape(3, 3, 2)
        assert (square[: part.shape[0], : part.shape[1]] == part).all()
        assert square.sum() == part.sum()
    assert (patches_of(image, 1) == image.reshape(35, 2)).all()


def test_pixels_of_8_bits_are_taken_as_minus_one_to_one() -> None:
    frontend = Frontend(FrontendConfig("values", 1), 8)
    frontend.init_weights(0.02)
    pixels = torch.tensor([[[0], [255], [51]]], dtype=torch.uint8)
    torch.testing.assert_close(frontend(pixels), frontend(torch.tensor([[[-1.0], [1.0], [-0.6]]])))


def test_single_values_of_one_sign_are_told_apart_after_the_first_norm() -> None:
    frontend = Frontend(FrontendConfig("values", 1), 32)
    frontend.init_weights(0.02)
    low, high = torch.nn.functional.rms_norm(frontend(torch.tensor([[0.2], [1.0]])), (32,))
    assert (low - high).abs().max() > 0.05


@pytest.mark.parametrize("learned", [False, True])
def test_packed_images_give_what_they_give_alone(learned: bool) -> None:
    net = image_model(learned_places=learned)
    images = torch.randn(3, 20, 12, dtype=torch.float64)
    segments = torch.tensor([[1] * 20 + [2] * 20 + [3] * 20 + [0] * 5])
    row = torch.cat([images.flatten(0, 1), torch.randn(5, 12, dtype=torch.float64)])[None]
    positions = torch.cat([torch.arange(20).repeat(3), torch.zeros(5, dtype=torch.long)])[None]
    packed = net.hidden_states(row, segment_ids=segments, positions=positions)
    alone = net.hidden_states(images)
    torch.testing.assert_close(packed[0, :60].unflatten(0, (3, 20)), alone, rtol=0, atol=1e-12)
    ahead = net.hidden_states(row, segment_ids=segments, layout=net.layout_plan().build(segments))
    torch.testing.assert_close(ahead[0, :60], packed[0, :60], rtol=0, atol=1e-12)


def test_places_matter() -> None:
    """The patches of an image in another order are another image, also without learned places."""
    net = image_model()
    image = torch.randn(1, 20, 12, dtype=torch.float64)
    assert not torch.allclose(net(image)[0, 0], net(image.flip(1))[0, 0], atol=1e-6)


def test_every_weight_learns() -> None:
    net = image_model(learned_places=True)
    net(torch.randn(2, 20, 12, dtype=torch.float64)).square().sum().backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is None] == []


def test_frames_are_read_from_left_to_right_too() -> None:
    net = model(FrontendConfig("frames", 6), causal=True)
    frames = torch.randn(1, 9, 6, dtype=torch.float64)
    whole, part = net.hidden_states(frames), net.hidden_states(frames[:, :5])
    torch.testing.assert_close(whole[:, :5], part, rtol=0, atol=1e-12)


def test_the_file_of_a_model_keeps_its_frontend_and_others_stay_what_they_were() -> None:
    config = image_model().config
    assert ModelConfig(**config.to_dict()) == config
    assert "frontend" not in ModelConfig(vocab_size=8).to_dict()


def test_a_frontend_without_a_head_has_nothing_to_write() -> None:
    net = DualRoutingTransformer(ModelConfig(**SHAPE, frontend=FrontendConfig("values")))
    with pytest.raises(UserError, match="task_head"):
        net(torch.zeros(1, 4, 1))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("patches", 4), {}, "give two numbers"),
        (("patches", 4, [4, 4], [2]), {}, "give two numbers"),
        (("values", 1, [4, 4], [2, 2]), {}, "are of patches, not of values"),
        (("patches", 4, [4, 4], [5, 2]), {}, "region_height=5 is above"),
        (("patches", 4, [4, 4], [2, 4]), IMAGES, "use block=8"),
        (("patches", 4, [4, 4], [2, 2]), {**IMAGES, "causal": True}, "causal=False"),
        (("frames", 0), {}, "features"),
    ],
)
def test_frontends_that_do_not_fit_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**{**SHAPE, **options}, frontend=FrontendConfig(*arguments))


def test_attention_arithmetic_counts_squares_of_images_and_the_choice_of_blocks() -> None:
    """A patch of 5 x 4 reads 2.6 x 2.5 patches on average with window 2: 3 each way, but for the edges."""
    routed = image_model()
    local = 2.6 * 2.5
    read = 2 * 3 * 4 + 2 * local  # 2 heads read three regions of four, 2 heads a square
    chosen = 2 * 20 * (4 / 2 + 6 / 4)  # bounds of two patches, summaries of four
    assert routed.attention_flops_per_token(20) == pytest.approx(2 * 4 * (4 * read + chosen))
    dense = model(FrontendConfig("patches", 12, [5, 4], [2, 2]), **IMAGES, attention="dense")
    assert dense.attention_flops_per_token(20) == 2 * 4 * 4 * 4 * 20
