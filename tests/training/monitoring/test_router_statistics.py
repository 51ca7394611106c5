"""Router statistics are collected while asked for, and only then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualroute.training.monitoring.router_statistics import RouterStatistics


class Routed(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.collect_statistics = False
        self.statistics: dict[str, torch.Tensor] = {}
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.collect_statistics:
            self.statistics = {
                "router_entropy": torch.tensor(self.value),
                "mass_far": torch.tensor(self.value / 2, dtype=torch.bfloat16),
            }
        return x


def test_values_of_layers_and_their_mean() -> None:
    model = nn.Sequential(Routed(0.25), nn.Identity(), nn.Sequential(Routed(0.75)))
    collector = RouterStatistics()
    assert collector.end() == {}
    collector.begin(model)
    model(torch.zeros(1))
    assert collector.end() == pytest.approx(
        {
            "router/router_entropy/layer_00": 0.25,
            "router/router_entropy/layer_01": 0.75,
            "router/router_entropy/mean": 0.5,
            "router/mass_far/layer_00": 0.125,
            "router/mass_far/layer_01": 0.375,
            "router/mass_far/mean": 0.25,
        }
    )
    assert not any(m.collect_statistics for m in model.modules() if isinstance(m, Routed))
    assert collector.end() == {}


def test_layers_that_did_not_run_are_left_out() -> None:
    model = nn.ModuleList([Routed(0.5), Routed(1.0)])
    collector = RouterStatistics()
    collector.begin(model)
    model[1](torch.zeros(1))
    values = collector.end()
    assert values["router/router_entropy/mean"] == 1.0
    assert "router/router_entropy/layer_00" not in values


def test_a_model_without_routers_is_fine() -> None:
    collector = RouterStatistics()
    collector.begin(nn.Linear(1, 1))
    assert collector.end() == {}


def test_maps_come_only_where_they_are_asked_for() -> None:
    class Mapped(Routed):
        collect_map = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            if self.collect_map:
                self.statistics["block_map"] = torch.eye(3)
            return x

    model, collector = Mapped(0.5), RouterStatistics()
    for maps in (True, False):
        collector.begin(model, maps)
        model(torch.zeros(1))
        assert collector.end()["router/router_entropy/mean"] == 0.5
        assert list(collector.maps) == (["layer_00"] if maps else [])
