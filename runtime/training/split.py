"""How the sequences of a step are cut into micro-batches that ranks share evenly."""

from __future__ import annotations

import dataclasses

from config_model import TrainConfig


def with_split_for(world: int, config: TrainConfig, notes: list[str]) -> TrainConfig:
    """Return the config with micro-batches that `world` ranks share evenly; add a line to notes.

    The sequences of a step stay the same. Raise ValueError where they cannot be shared out.
    """
    if config.grad_accum % world == 0:
        return config
    sequences = config.batch_size * config.grad_accum
    if sequences % world:
        fitting = [n for n in range(1, sequences + 1) if sequences % n == 0]
        below = max(n for n in fitting if n < world)
        raise ValueError(
            f"{world} ranks cannot share {config.batch_size} x {config.grad_accum} = {sequences} "
            f"sequences a step evenly: take {below} ranks, or --batch_size and --grad_accum whose "
            f"product is {sequences // world * world or world} or another multiple of {world}"
        )
    size = next(
        b
        for b in range(config.batch_size, 0, -1)
        if sequences % b == 0 and sequences // b % world == 0
    )
    notes.append(
        f"batch    {size} x {sequences // size} sequences a step instead of {config.batch_size} x "
        f"{config.grad_accum}, so that {world} ranks share them evenly: balance loss and dropout "
        "are those of the new split"
    )
    changed = dataclasses.replace(config, batch_size=size, grad_accum=sequences // size)
    return with_validation_of(changed, config.batch_size)


def with_validation_of(config: TrainConfig, batch_size: int) -> TrainConfig:
    """Return a config whose val_steps were for another batch_size.

    A validation keeps its sequences, rounded up to whole micro-batches.
    """
    sequences = config.val_steps * batch_size
    return dataclasses.replace(config, val_steps=-(-sequences // config.batch_size))
