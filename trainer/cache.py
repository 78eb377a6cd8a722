"""Caches of keys and values: one run of a prompt serves all of its completions.

`prefill` runs each prompt once and copies its keys and values to its rows, for sampling and for
the update. Sampling then continues in a cache with room for more tokens, or in one of fixed shape.
"""

import functools
import inspect

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

PLAIN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}  # of a cache: keys and values alone


def left_padded(prompts, pad_id, device):
    """Pad the prompts on the left: (token ids, 1 for tokens and 0 for padding), both [P, L]."""
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    real = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    real = pad_sequence(real, batch_first=True, padding_value=0, padding_side="left")
    return ids, real


def prefill(model, ids, real, which):
    """Run each left-padded prompt without its last token, and copy its keys and values to its rows.

    ids [P, L]: token ids. real [P, L]: 1 for tokens of the prompt, 0 for padding. which [B]: the
    prompt of each row. Returns the cache of B rows, differentiable; pass it to the model as its
    argument `cache_argument(model)`.
    """
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        positions = (real.cumsum(1) - 1).clamp(min=0)  # padding would get -1
        model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=real[:, :-1],
            position_ids=positions[:, :-1],
            use_cache=True,
            **{cache_argument(model.base_model): cache},
        )
        select_rows(cache, which)
    return cache


def select_rows(cache, which):
    """Replace the cache's rows by the rows `which` [B], in place.

    cache.batch_select_indices indexes. On a CPU, several threads add up the gradient of an index
    that occurs more than once, in no fixed order: it would round differently from run to run. The
    gradient of index_select is added up in order.
    """
    for layer in cache.layers:
        if type(layer) in PLAIN_LAYERS and layer.get_seq_length() > 0:
            layer.keys = layer.keys.index_select(0, which)
            layer.values = layer.values.index_select(0, which)
        else:
            layer.batch_select_indices(which)


def cache_argument(model):
    """The name of the model's argument for the cache of keys and values.

    transformers 5.24 renamed `past_key_values` to `cache`; 5.40 will drop the old name.
    """
    return _cache_argument(type(model))


@functools.cache
def _cache_argument(kind):
    parameters = inspect.signature(kind.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, with room for more: a new token rarely copies the earlier ones.

    DynamicLayer copies all of them for every token. Here they are views of the first tokens of
    larger buffers, whose length doubles when they are full.
    Without it, sampling from the embedded model takes 6 to 8% longer.
    """

    def __init__(self, layer):
        super().__init__()
        vars(self).update(vars(layer))
        self.buffers = {}

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys = self.append("keys", self.keys, key_states)
        self.values = self.append("values", self.values, value_states)
        return self.keys, self.values

    def append(self, name, past, new):
        """past [B, H, n, D] and new [B, H, k, D] -> [B, H, n + k, D], a view of a buffer."""
        start, stop = past.shape[2], past.shape[2] + new.shape[2]
        buffer = self.buffers.get(name)
        # Another address: rows were selected, so `past` is no longer the start of the buffer.
        full = buffer is None or buffer.data_ptr() != past.data_ptr() or stop > buffer.shape[2]
        if full:
            batch, heads, _, size = new.shape
            buffer = self.buffers[name] = new.new_empty(batch, heads, 2 * stop, size)
            buffer[:, :, :start] = past
        buffer[:, :, start:stop] = new
        return buffer[:, :, :stop]


def with_room(cache):
    """The cache, with its plain layers as RoomyLayer; others, such as sliding windows, stay."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[i] = RoomyLayer(layer)
    return cache


def static_cache(model, filled, rows, tokens):
    """A cache for `rows` rows of `tokens` tokens, with the keys and values of the cache `filled`.

    On CUDA, generate compiles the model if its cache has a fixed shape, and compiles it again for
    other tensors. So the model keeps this cache, and gets the same one for equal shapes.
    """
    tokens = -(-tokens // 128) * 128  # rounded up: fewer shapes
    shape, cache = vars(model).get("kept_cache", (None, None))
    if shape != (rows, tokens):
        cache = StaticCache(config=model.config, max_cache_len=tokens)
        model.kept_cache = (rows, tokens), cache
    cache.reset()
    for i, layer in enumerate(filled.layers):
        if layer.get_seq_length() > 0:
            cache.update(layer.keys, layer.values, i)
    return cache
