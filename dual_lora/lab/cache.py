"""The keys and values `generate` works on: prompts are read once, not once a beam, and nothing is copied to grow."""

from os.path import commonprefix

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class BeamLayer(DynamicLayer):
    """One layer's keys and values, ... x tokens x size, for beams that share their prompt, with room for what comes.

    A new token is written in place, and reordering beams moves generated tokens only; the usual cache copies the whole
    of itself for either, half of the time of a beam search on a CPU.
    """

    def __init__(self, prompt: DynamicLayer, beams: int, room: int) -> None:
        super().__init__()
        self.prompt = self.length = prompt.get_seq_length()
        self.space = [
            torch.nn.functional.pad(t.repeat_interleave(beams, dim=0), (0, 0, 0, room))
            for t in (prompt.keys, prompt.values)
        ]
        self.dtype, self.device, self.is_initialized = prompt.keys.dtype, prompt.keys.device, True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (space[..., : self.length, :] for space in self.space)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        for space, new in zip(self.space, (key_states, value_states), strict=True):
            space[..., self.length : end, :] = new
        self.length = end
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for space in self.space:
            generated = space[..., self.prompt : self.length, :]
            generated.copy_(generated.index_select(0, beam_idx))


def read(model: PreTrainedModel, prompts: list[list[int]], pad: int, beams: int, room: int) -> dict:
    """Return what `generate` takes for these prompts: token ids, mask, and the cache of all tokens but the last.

    What all prompts begin with is read once for all of them, the rest once a prompt; then the cache is copied for each
    beam, where `generate` by itself would read every prompt once a beam. Padding stands between the two parts. room:
    how many tokens will be generated.
    """
    width = max(map(len, prompts))
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        mask[row, :shared] = 1
        mask[row, width - len(prompt) + shared :] = 1
        ids[row, mask[row].bool()] = torch.tensor(prompt)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if width < 2:
        return inputs
    ids, mask = inputs.values()
    cache = DynamicCache(config=model.config)
    if shared:
        model.base_model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    if shared < width - 1:
        model.base_model(
            input_ids=ids[:, shared:-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:-1],
            past_key_values=cache,
            use_cache=True,
        )
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = BeamLayer(layer, beams, room + 1)
        else:  # a sliding window shifts what it holds
            layer.batch_repeat_interleave(beams)
    return {**inputs, "past_key_values": cache}
