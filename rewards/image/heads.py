"""The multilayer perceptrons on top of an embedding, built from the tensors of their files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

# places of the linear layers in the file's nn.Sequential
ONE: tuple[int, ...] = (0,)
LINEAR: tuple[int, ...] = (0, 2, 4, 6, 7)  # dropouts between them
RELU: tuple[int, ...] = (0, 3, 6, 9, 11)  # ReLUs and dropouts between them


def head_of(state: Mapping[str, Tensor], source: str) -> nn.Module:
    """[n, D] -> [n, 1], of the layout that the keys show.

    * `weight`, `bias`: one linear layer (LAION-AI/aesthetic-predictor).
    * `layers.{0,2,4,6,7}.*`: five linear layers without activations, so one affine map
      (christophschuhmann/improved-aesthetic-predictor, linearMSE; ImageReward's head).
    * `layers.{0,3,6,9,11}.*`: the same widths with ReLU between them (reluMSE).

    Dropout is left out: a reward is never in training. ValueError for other keys; source: what they are of.
    """
    if set(state) == {"weight", "bias"}:
        state = {f"layers.0.{name}": tensor for name, tensor in state.items()}
    found = {key.rpartition(".")[0] for key in state}
    places = next((known for known in (ONE, LINEAR, RELU) if found == {f"layers.{place}" for place in known}), None)
    if places is None:
        raise ValueError(
            f"got {source} with the tensors {sorted(state)}; expected weight and bias, or those of layers {LINEAR} or {RELU}"
        )
    layers: list[nn.Module] = []
    for place in places:
        width, inputs = state[f"layers.{place}.weight"].shape
        layer = nn.Linear(inputs, width)
        layer.load_state_dict({name: state[f"layers.{place}.{name}"] for name in ("weight", "bias")})
        layers += [nn.ReLU(), layer] if places is RELU and layers else [layer]
    return nn.Sequential(*layers)
