"""Recomputed activations: the same numbers, less memory."""

import subprocess
import sys

import pytest
import torch

from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.step.activations import keep_fewer_activations
from tests.conftest import ROOT

WAYS = [
    {"what": "none"},
    {"what": "full"},
    {"what": "full", "every": 2},
    {"what": "feed_forward"},
    {"what": "none", "offload": True},
    {"what": "full", "offload": True},
]

PEAK = """
import os
import sys
import torch
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.training.step.activations import keep_fewer_activations

for what, every in zip(sys.argv[1::2], sys.argv[2::2]):  # each in a copy of a process that has done nothing
    child = os.fork()
    if child == 0:
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()

def status(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field))

torch.manual_seed(0)
torch.set_num_threads(1)
model = DualRoutingTransformer(ModelConfig(vocab_size=64, dim=64, num_layers=8, num_heads=4, max_context=4096,
                                           window=64, block=64, top_k=4, global_mode="routed"))
keep_fewer_activations(model, what, every=int(every))
ids = torch.randint(64, (1, 4096))
model.hidden_states(ids[:, :512]).sum().backward()  # gradients, threads and caches exist already
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model.hidden_states(ids).sum().backward()
print(status("VmHWM") - before)
"""


def gradients(**way):
    torch.manual_seed(3)
    model = DualRoutingTransformer(
        ModelConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, window=8, block=16, top_k=2,
                    global_mode="routed", max_context=128)
    )  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    keep_fewer_activations(model, **way)
    assert [name for name, _ in model.named_parameters()] == names
    ids = torch.randint(50, (2, 128), generator=torch.Generator().manual_seed(1))
    loss = model(ids).logsumexp(-1).sum()
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
def test_loss_and_gradients_stay_the_same_to_the_last_bit(way):
    loss, grads = gradients(what="none")
    other, others = gradients(**way)
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def peaks(*ways):
    words = [str(word) for way in ways for word in way]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *words], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return map(int, result.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_really_falls():
    none, half, full, feed_forward = peaks(("none", 1), ("full", 2), ("full", 1), ("feed_forward", 1))
    assert full < 0.5 * none
    assert full < half < none
    assert full < feed_forward < 0.85 * none
