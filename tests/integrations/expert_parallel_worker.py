"""One process of transformers' own expert parallelism: compares with the whole model on eager and prints the errors.

torchrun runs it: expert_parallel_worker.py MODEL_CLASS FOLDER
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import transformers
from transformers import DistributedConfig

from integrations.families import loss_of, output, tokens
from moekit.integrations.transformers import expert_modules, use_moekit


def grads(model, ids):
    """Every gradient, whole."""
    loss_of(output(model, ids), ids).backward()
    found = (parameter.grad for parameter in model.parameters())
    return [each.full_tensor() if hasattr(each, "full_tensor") else each for each in found]


def main(model_class, folder):
    dist.init_process_group("gloo")
    load, ids = getattr(transformers, model_class).from_pretrained, tokens()
    whole = load(folder, experts_implementation="eager")
    for exchange in ("all_reduce", "all_to_all"):
        spread = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=exchange)
        model = use_moekit(load(folder, distributed_config=spread))
        assert all(module.num_experts == 2 for module in expert_modules(model).values())
        with torch.no_grad():
            errors = [(output(model, x) - output(whole, x)).abs().max().item() for x in (ids, ids[:1, :4])]
        whole.zero_grad()
        pairs = zip(grads(model, ids), grads(whole, ids), strict=True)
        errors.append(max((got - want).abs().max().item() for got, want in pairs))
        if dist.get_rank() == 0:
            print(exchange, *errors, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
