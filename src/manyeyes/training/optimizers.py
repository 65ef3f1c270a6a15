"""Optimizers: Keras's own, with LARS and a Muon that also takes convolutions, and one rule for weight decay.

Weight decay is decoupled everywhere: before the gradient step, w becomes w - learning_rate * weight_decay * w, and the
gradient does not know of it (so momentum does not accumulate it; for "sgd" this differs from an L2 term in the loss).
Biases and the scales and offsets of normalisation layers are left out; Muon and LARS treat them apart (`is_matrix`).
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from manyeyes.training.settings import OptimizerSettings

LARS_TRUST = 0.001
# Layers whose weights Muon leaves to its AdamW part, as its authors advise: what turns features into logits.
_HEAD_PATTERN = "logits"


def create_optimizer(
    settings: OptimizerSettings, model: keras.Model, *, loss_scaling: bool = False
) -> keras.optimizers.Optimizer:
    """Make the optimizer and its variables for all weights of `model` that can ever be trained.

    Args:
        model: with nothing frozen.
        loss_scaling: scale the loss dynamically, for float16.
    """
    variables = list(model.trainable_variables)
    decay = settings.weight_decay
    common: dict[str, Any] = {
        "learning_rate": settings.peak_learning_rate(None),  # every step sets it
        "weight_decay": decay or None,
        "global_clipnorm": settings.clip_norm or None,
        "name": settings.name,
    }
    momentum = {"momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.name == "sgd":
        optimizer = keras.optimizers.SGD(**common, **momentum)
    elif settings.name == "adamw":
        optimizer = keras.optimizers.AdamW(**{**common, "weight_decay": decay})
    elif settings.name == "lamb":
        optimizer = keras.optimizers.Lamb(**common)
    elif settings.name == "lars":
        optimizer = Lars(momentum=settings.momentum, **common)
    else:
        optimizer = ConvolutionalMuon(
            **common, **momentum, adam_weight_decay=decay or None, exclude_layers=[_HEAD_PATTERN]
        )
    optimizer.exclude_from_weight_decay(var_list=[variable for variable in variables if not is_matrix(variable)])
    if loss_scaling:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale")
    optimizer.build(variables)
    return optimizer


def is_matrix(variable: Any) -> bool:
    """Whether a variable is a kernel, not a bias or a scale or offset of a norm (a GRU's bias has two dimensions)."""
    return len(variable.shape) >= 2 and "bias" not in variable.name


def reset(optimizer: keras.optimizers.Optimizer) -> None:
    """Set momentum, second moments and the count of iterations to zero, as they are in a fresh optimizer."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for variable in inner.variables:
        if variable is not inner.learning_rate:
            variable.assign(ops.zeros_like(variable))


class Lars(keras.optimizers.SGD):
    """SGD with momentum whose step is scaled layer by layer to the norm of the weights (You et al., 2017).

    A kernel moves by learning_rate * trust * |w| / |g| * g; the others by learning_rate * g.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Scale the gradient, then do the step of SGD."""
        if is_matrix(variable):
            weight_norm, gradient_norm = ops.norm(ops.reshape(variable, (-1,))), ops.norm(ops.reshape(gradient, (-1,)))
            both = ops.logical_and(weight_norm > 0, gradient_norm > 0)
            ratio = LARS_TRUST * weight_norm / ops.where(both, gradient_norm, 1.0)
            gradient = gradient * ops.where(both, ratio, 1.0)
        super().update_step(gradient, variable, learning_rate)


class ConvolutionalMuon(keras.optimizers.Muon):
    """Muon that orthogonalises convolution kernels too, as matrices of (height * width * inputs) x outputs.

    Keras's Muon takes matrices only and would leave all of a convolutional network but its head to AdamW.
    """

    def _should_use_adamw(self, variable: Any) -> bool:
        return not is_matrix(variable) or any(keyword in variable.path for keyword in self.exclude_layers)

    def _muon_update_step(self, gradient: Any, variable: Any, lr: Any, m: Any) -> None:
        self.assign(m, ops.add(gradient, m * self.momentum))
        direction = ops.add(gradient, self.momentum * m) if self.nesterov else ops.convert_to_tensor(m)
        matrix = ops.reshape(direction, (-1, variable.shape[-1]))
        update = self.lr_adjust(self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
        self.assign_sub(variable, lr * ops.reshape(update, variable.shape))
