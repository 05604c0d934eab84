"""What a weight is worth by its gradient: where it moves to (movement), or what its loss would cost (Taylor).

Both ask for the gradient of each optimizer step; what they add up, step by step, `criteria` keeps.
"""

import torch
from torch import Tensor


@torch.no_grad()
def movement_step(weight: Tensor, grad: Tensor) -> Tensor:
    """How far one step of gradient descent moves each weight away from zero: ``-w * dL/dw``, float32.

    The sum over the steps is the movement score (Sanh et al. 2020, https://arxiv.org/abs/2005.07683). There the scores
    S are learned: the network computes with W * mask(S), the straight-through gradient is dL/dS = dL/dW * W, and SGD
    takes S -= lr * dL/dS, which is this sum times a constant that no comparison sees.
    """
    return -weight.float() * grad.float()


@torch.no_grad()
def taylor_step(weight: Tensor, grad: Tensor) -> Tensor:
    """What setting each weight to zero changes in the loss, to first order, squared: ``(w * dL/dw)^2``, float32.

    Equation 8 of Molchanov et al. 2019 (https://arxiv.org/abs/1906.10771); its mean over the steps is the score.
    """
    return (weight.float() * grad.float()).square()
