"""Large results and gradients of `moe_mlp` are written to memory of those that are gone, never of those alive."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from moekit import kernels

TOKENS, EXPERTS, HIDDEN, INNER = 40, 8, 256, 512  # 8 and 4 MiB of gradients in fp32


class Layer:
    def __init__(self, dtype=torch.float32, seed=0):
        make = torch.Generator().manual_seed(seed)
        self.x = torch.randn(TOKENS, HIDDEN, generator=make).to(dtype)
        self.ids = torch.randint(0, EXPERTS, (TOKENS,), generator=make)
        self.up = torch.nn.Parameter((torch.randn(EXPERTS, 4 * INNER, HIDDEN, generator=make) * 0.05).to(dtype))
        self.down = torch.nn.Parameter((torch.randn(EXPERTS, HIDDEN, 2 * INNER, generator=make) * 0.05).to(dtype))

    def loss(self):
        args = (torch.arange(TOKENS), self.ids, torch.ones(TOKENS), self.up, None, self.down, None, "silu")
        return kernels.moe_mlp(self.x, *args).square().sum()

    def gradients(self):
        self.up.grad = self.down.grad = None
        self.loss().backward()
        return self.up.grad, self.down.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_gradients_are_where_the_last_ones_were_and_nothing_of_those_is_left(dtype):
    layer = Layer(dtype)
    first = [(each.data_ptr(), each.clone()) for each in layer.gradients()]
    for each in (layer.up.grad, layer.down.grad):
        each.fill_(float("nan"))
    del each
    for grad, (place, numbers) in zip(layer.gradients(), first, strict=True):
        assert grad.data_ptr() == place
        assert torch.equal(grad, numbers)


def test_autograd_keeps_the_tensor_that_the_op_wrote_and_copies_nothing():
    layer, seen = Layer(), []
    layer.up.register_hook(lambda grad: seen.append(grad.data_ptr()))
    assert layer.gradients()[0].data_ptr() == seen[0]


def test_gradients_that_somebody_holds_stay_as_they_are():
    layer = Layer()
    held = layer.gradients()
    copies = [each.clone() for each in held]
    view, places = held[0][3].view(-1), {each.data_ptr() for each in held}
    layer.x = layer.x * 2
    new = layer.gradients()
    assert places.isdisjoint(each.data_ptr() for each in new)
    for each, copy in zip(held, copies, strict=True):
        assert torch.equal(each, copy)
    kept = copies[0][3].view(-1)
    del held, new, each, copies
    layer.gradients()
    assert torch.equal(view, kept)  # a view is enough to hold the memory


def test_gradients_add_up_over_backward_passes_also_of_one_graph():
    layer = Layer()
    once = [each.clone() for each in layer.gradients()]
    layer.loss().backward()
    loss = layer.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    for parameter, each in zip((layer.up, layer.down), once, strict=True):
        assert torch.equal(parameter.grad, each * 4)


def test_threads_do_not_share_memory():
    layers = [Layer(seed=seed) for seed in range(3)]
    expected = [[each.clone() for each in layer.gradients()] for layer in layers]
    differ = []

    def work(layer, want):
        for _ in range(10):
            differ.extend(not torch.equal(got, each) for got, each in zip(layer.gradients(), want, strict=True))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differ) == 60
    assert not any(differ)


PROGRAM = """
import resource, sys, torch
from moekit import kernels

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def gradients(experts, tokens=64):
    up = torch.zeros(experts, 1024, 512, requires_grad=True)  # 2 MiB an expert, its gradient as much
    down = torch.zeros(experts, 512, 512, requires_grad=True)  # 1 MiB
    ids = torch.arange(tokens) % experts
    x = torch.ones(tokens, 512)
    kernels.moe_mlp(x, torch.arange(tokens), ids, torch.ones(tokens), up, None, down, None, "silu").sum().backward()

gradients(2)
before = resident()
for experts in (32, 16, 24, 8, 30, 12, 28, 20):
    gradients(experts)
    print(experts, resident() - before, file=sys.stderr)
kept = resident() - before
kernels.release_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_what_is_kept_is_no_more_than_was_once_in_use_and_is_given_back_on_request():
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps nothing itself
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=at_once)
    kept, left = map(float, done.stdout.split())
    largest = 32 * 3 * 1.125  # MiB, in blocks that may be an eighth larger
    assert 0.5 * largest < kept < largest + 24, done.stderr
    assert left < 24, done.stderr
