"""The gated delta rule token by token in float64, as it is defined, with its gradients; and inputs for it."""

import numpy as np

Parts = list[np.ndarray]  # queries, keys, values, decay, beta


def make_parts(length: int, alike: bool = False, repeats: int = 2, seed: int = 0) -> Parts:
    """Of two rows and two key heads. alike: keys that hardly differ, written and kept in full."""
    random = np.random.default_rng(seed)
    queries, keys = random.normal(size=(2, 2, 2, length, 12))
    values = random.normal(size=(2, 2 * repeats, length, 8))
    if alike:
        keys = keys[:, :, :1] + 0.05 * keys
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True) * 12**0.5
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    decay, beta = -random.uniform(size=(2, 2 * repeats, length)), random.uniform(size=(2, 2 * repeats, length))
    return [queries, keys, values, *((0.01 * decay, 0.9 + 0.1 * beta) if alike else (decay, beta))]


def recurrence(parts: Parts, grad: np.ndarray, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, Parts]:
    """`(outputs, last state, gradients of the parts)`, where `grad` is that of the outputs."""
    queries, keys, values, decay, beta = parts
    heads = keys.shape[1]
    queries, keys = (np.repeat(part, values.shape[1] // heads, axis=1) for part in (queries, keys))
    if state is None:
        state = np.zeros((*values.shape[:2], keys.shape[-1], values.shape[-1]))
    outputs, errors, kept = np.zeros_like(values), np.zeros_like(values), np.exp(decay)[..., None, None]
    states = [state]
    for t in range(values.shape[2]):
        state = kept[:, :, t] * states[-1]
        errors[:, :, t] = values[:, :, t] - np.einsum("bhkv,bhk->bhv", state, keys[:, :, t])
        state = state + np.einsum("bhk,bhv->bhkv", keys[:, :, t], beta[:, :, t, None] * errors[:, :, t])
        outputs[:, :, t] = np.einsum("bhkv,bhk->bhv", state, queries[:, :, t])
        states.append(state)
    grads = [np.zeros_like(part) for part in (queries, keys, values, decay, beta)]
    of_state = np.zeros_like(state)
    for t in reversed(range(values.shape[2])):
        key, before = keys[:, :, t], kept[:, :, t] * states[t]
        grads[0][:, :, t] = np.einsum("bhkv,bhv->bhk", states[t + 1], grad[:, :, t])
        of_state = of_state + np.einsum("bhk,bhv->bhkv", queries[:, :, t], grad[:, :, t])
        of_write = np.einsum("bhkv,bhk->bhv", of_state, key)
        grads[4][:, :, t] = (of_write * errors[:, :, t]).sum(-1)
        grads[2][:, :, t] = of_error = beta[:, :, t, None] * of_write
        grads[1][:, :, t] = np.einsum("bhkv,bhv->bhk", of_state, beta[:, :, t, None] * errors[:, :, t])
        grads[1][:, :, t] -= np.einsum("bhkv,bhv->bhk", before, of_error)
        of_state = of_state - np.einsum("bhk,bhv->bhkv", key, of_error)
        grads[3][:, :, t] = (of_state * before).sum((-1, -2))
        of_state = kept[:, :, t] * of_state
    for number in (0, 1):
        grads[number] = grads[number].reshape(2, heads, -1, *grads[number].shape[2:]).sum(2)
    return outputs, states[-1], grads


def check_close(found: list[np.ndarray], expected: list[np.ndarray], rtol: float = 1e-5) -> None:
    """By the largest value of each array."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = max(np.abs(other).max(), 1e-3)
        assert np.abs(one - other).max() < rtol * scale, (number, np.abs(one - other).max() / scale)
