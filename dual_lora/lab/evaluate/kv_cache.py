"""The keys and values of decoding: prompts are read once, not once per beam, and growing copies nothing."""

from itertools import cycle, islice
from os.path import commonprefix
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dual_lora.lab.errors import is_out_of_memory
from dual_lora.lab.model.load import agree_up_to_rounding, is_sharded, switch_mode

PROBE_START, PROBE_ENDS = 4, (2, 12)  # tokens that the two prompts of `probe_prompts` share, and that follow them
PROBE_BEAMS = 2
# What `probe_prompts` found. It depends only on the architecture, so once for each model is enough.
PROBED: WeakKeyDictionary[PreTrainedModel, bool | None] = WeakKeyDictionary()


class BeamLayer(DynamicLayer):
    """One layer's keys and values, ... x tokens x size, for beams that share their prompt, with room for new tokens.

    A new token is written in place, and reordering beams moves generated tokens only. The usual cache copies itself
    entirely in both cases, which takes half the time of a beam search on a CPU.

    prompt: keys and values of the prompts, one row each. room: how many new tokens to reserve space for.
    """

    def __init__(self, prompt: DynamicLayer, beams: int, room: int) -> None:
        super().__init__()
        self.prompt = self.length = prompt.get_seq_length()
        self.space = []
        for held in (prompt.keys, prompt.values):
            space = held.new_empty(len(held), beams, *held.shape[1:-2], self.length + room, held.shape[-1])
            space[..., : self.length, :] = held[:, None]
            self.space.append(space.flatten(0, 1))
        self.dtype, self.device, self.is_initialized = prompt.keys.dtype, prompt.keys.device, True
        self._trim_views()

    def _trim_views(self) -> None:
        self.keys, self.values = (space[..., : self.length, :] for space in self.space)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write new keys and values, beams x heads x new tokens x size, in place; return all up to and with them."""
        end = self.length + key_states.shape[-2]
        for space, new in zip(self.space, (key_states, value_states), strict=True):
            space[..., self.length : end, :] = new
        self.length = end
        self._trim_views()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that `beam_idx` lists, in its order. While no prompt is done, a beam only continues one of its
        own prompt, so the prompt's keys and values stay where they are.
        """
        if len(beam_idx) < len(self.keys):  # some prompts are done
            self.space = [space.index_select(0, beam_idx) for space in self.space]
            return self._trim_views()
        for space in self.space:
            generated = space[..., self.prompt : self.length, :]
            generated.copy_(generated.index_select(0, beam_idx))


def expand_cache(cache: DynamicCache, beams: int, room: int) -> None:
    """Give each prompt of a cache as many rows as it has beams, with room for `room` more tokens."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = BeamLayer(layer, beams, room)
        else:  # a sliding window shifts what it holds
            layer.batch_repeat_interleave(beams)


def read_prompts(model: PreTrainedModel, prompts: list[list[int]], pad: int, room: int = 0) -> dict:
    """Return token ids and mask (prompts x tokens), and the cache of all tokens but the last, one row per prompt.

    A prefix that all prompts share is read once, and padding goes between the prefix and the rest. A model that counts
    columns, padding included, reads the full prompts, padded on the left: one with ALiBi by column, or with a window
    too narrow for the prompts and `room` more tokens.
    """
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    longest = max(map(len, prompts)) + room
    if shared and (longest > get_window(model, longest) or not probe_prompts(model, pad)):
        shared = 0
    return read_behind_prefix(model, prompts, pad, shared)


def get_window(model: PreTrainedModel, longest: int) -> int:
    """Return how many columns a model's narrowest layer looks back, at most `longest`. Caches know the windows of their
    layers, except for GPT-Neo's."""
    layers = DynamicCache(config=model.config).layers
    windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    config = model.config.get_text_config(decoder=True)
    if "local" in getattr(config, "attention_layers", ()):
        windows.append(config.window_size)
    return min([longest, *windows])


def read_behind_prefix(model: PreTrainedModel, prompts: list[list[int]], pad: int, shared: int) -> dict:
    """Return what `read_prompts` does, where the first `shared` tokens of all prompts are read once."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        mask[row, :shared] = 1
        mask[row, width - len(prompt) + shared :] = 1
        ids[row, mask[row].bool()] = torch.tensor(prompt)
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = DynamicCache(config=model.config)
    into = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}  # none is needed, but 0 would mean all
    if shared:
        model(input_ids=ids[:1, :shared], **into)
        cache.batch_repeat_interleave(len(prompts))
    if shared < width - 1:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:-1]
        model(input_ids=ids[:, shared:-1], attention_mask=mask[:, :-1], position_ids=places, **into)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


def compute_next_logits(model: PreTrainedModel, rows: Tensor, attention_mask: Tensor, cache: Cache) -> Tensor:
    """Return the logits of the token after each row, rows x vocabulary, in float32.

    rows, attention_mask: rows x tokens. cache: holds all tokens but the last, which it gets.
    """
    found = model(
        input_ids=rows[:, -1:],
        attention_mask=attention_mask,
        position_ids=attention_mask.sum(-1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    return found.logits[:, -1].float()


@torch.no_grad()
def probe_prompts(model: PreTrainedModel, pad: int) -> bool | None:
    """Return whether prompts get the same logits in a batch, read through a cache, as each by itself: True even if the
    prefix they share is read once, False only if each is read in full, None in neither case. Two short prompts are
    tried, once for each model. A sharded model is not tried.
    """
    if is_sharded(model):
        return True
    if model not in PROBED:
        with switch_mode(model, training=False):
            PROBED[model] = next((bool(n) for n in (PROBE_START, 0) if reads_as_alone(model, pad, n)), None)
    return PROBED[model]


def reads_as_alone(model: PreTrainedModel, pad: int, shared: int) -> bool:
    """Return whether two short prompts of different lengths get the same logits in a batch as each by itself, for the
    token after them and for the next one. The first `shared` tokens are read once."""
    known = [token for token in range(min(model.config.get_text_config().vocab_size, 64)) if token != pad]
    tokens = islice(cycle(known), PROBE_START + sum(PROBE_ENDS) + 1)
    start, following, *ends = (list(islice(tokens, count)) for count in (PROBE_START, 1, *PROBE_ENDS))
    prompts = [start + end for end in ends]
    texts = [torch.tensor([prompt + following], device=model.device) for prompt in prompts]
    single = torch.cat([model(input_ids=text, use_cache=False).logits[0, -2:] for text in texts])
    try:
        inputs = read_behind_prefix(model, prompts, pad, shared)
        cache = inputs["past_key_values"]
        expand_cache(cache, PROBE_BEAMS, 2)
        rows, mask = (inputs[name].repeat_interleave(PROBE_BEAMS, 0) for name in ("input_ids", "attention_mask"))
        first = compute_next_logits(model, rows, mask, cache)
        cache.reorder_cache(torch.arange(len(rows), device=model.device))
        rows, mask = pad_tensor(rows, (0, 1), value=following[0]), pad_tensor(mask, (0, 1), value=1)
        second = compute_next_logits(model, rows, mask, cache)
    except Exception as error:  # of any kind: the model has another kind of cache, or takes none
        if is_out_of_memory(error):
            raise
        return False
    batched = torch.stack([first, second], 1)[::PROBE_BEAMS].flatten(0, 1)
    return agree_up_to_rounding(batched, single, model)
