"""Beam search in which a prompt leaves the batch as soon as its own search is done.

There are two searches. Both rank texts by log-probability / length ** `task.length_penalty`, the end token included.

transformers  each step considers at least twice as many continuations as beams, so that the beams stay full even if
              texts end. Repeated n-grams are banned after the softmax: the rest keeps its probability. A prompt is done
              when as many texts have ended as there are beams, and no beam is better than the worst of them.
gpt2_beam     that of LoRA's experiments (microsoft/LoRA@c4593f06, examples/NLG/src/gpt2_beam.py): each step considers
              as many continuations as beams. One that ends takes a beam's place, and the next step starts with one
              fewer. Bans come before the softmax, so that what is allowed shares the full probability. It always
              continues to the maximum length and returns the best text, ended or not. Here a prompt is done as soon as
              no beam can become better than the best text, which changes no output.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from dual_lora.lab.evaluate.kv_cache import compute_next_logits, expand_cache

IMPOSSIBLE = -1e9  # the score of a beam that must not continue


def search_beams(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    gpt2_beam: bool = False,
    **inputs: Tensor | Cache,
) -> Tensor:
    """Return the best sequence of each prompt, prompts x tokens, padded after its end.

    Passed to `generate` as `custom_generate`. Without `gpt2_beam` the sequences equal those of generate's own beam
    search, which keeps computing all prompts of a batch until the last one is done. (They may differ if early_stopping
    is used with more beams than there are tokens to choose from.)

    input_ids: (prompts * beams) x tokens. inputs["past_key_values"] holds all of them but the last, one row per prompt.
    """
    config, beams = generation_config, generation_config.num_beams
    start, end, fill = input_ids.shape[1], config.max_length, config.pad_token_id
    # Enough that `beams` of them continue even if all others end, but for gpt2_beam.
    count = beams if gpt2_beam else max(2, 1 + len(config._eos_token_tensor)) * beams
    kept = 1 if gpt2_beam else beams  # ended texts of a prompt
    patient = gpt2_beam or config.early_stopping == "never"
    cache, attention_mask = inputs["past_key_values"], inputs["attention_mask"]
    if attention_mask is None:  # `generate` drops one without zeros
        attention_mask = torch.ones_like(input_ids)
    tokens = input_ids.unflatten(0, (-1, beams))
    scores = torch.full(tokens.shape[:2], IMPOSSIBLE, device=tokens.device)
    scores[:, 0] = 0  # at first all beams of a prompt are one
    finished, best = tokens[:, :kept], torch.full_like(scores[:, :kept], -torch.inf)
    prompt_indices = torch.arange(len(tokens), device=tokens.device)
    results = torch.full((len(tokens), end), fill, device=tokens.device)
    while len(prompt_indices):
        rows = tokens.flatten(0, 1)
        if rows.shape[1] == start:
            logits = compute_next_logits(model, rows[::beams], attention_mask[::beams], cache)
            expand_cache(cache, beams, end - start)
            logits = logits.repeat_interleave(beams, 0)
        else:
            logits = compute_next_logits(model, rows, attention_mask, cache)
        if gpt2_beam:
            log_probs = logits_processor(rows, logits).log_softmax(-1)
        else:
            log_probs = logits_processor(rows, logits.log_softmax(-1))
        log_probs = log_probs.unflatten(0, (-1, beams))
        candidate_scores, chosen = (scores[..., None] + log_probs).flatten(1).topk(count)
        parents, next_tokens = chosen // log_probs.shape[-1], chosen % log_probs.shape[-1]
        candidates = torch.cat([tokens.take_along_dim(parents[..., None], 1), next_tokens[..., None]], -1)
        ended = stopping_criteria(candidates.flatten(0, 1), None).unflatten(0, (-1, count))
        length = candidates.shape[-1] - start

        ending = (candidate_scores / length**config.length_penalty).masked_fill(~ended, -torch.inf)
        best, finished = keep_best_texts(
            best, pad(finished, (0, 1), value=fill), ending[:, :beams], candidates[:, :beams]
        )
        scores, order = (candidate_scores + ended * IMPOSSIBLE).topk(beams)
        tokens, parents = candidates.take_along_dim(order[..., None], 1), parents.take_along_dim(order, 1)

        has_all_texts = best.isfinite().all(1)
        best_length = end - start if patient and config.length_penalty > 0 else length
        # no beam can beat the worst text
        cannot_improve = scores[:, 0] / best_length**config.length_penalty <= best[:, -1]
        done = ended.all(1) | (has_all_texts & (cannot_improve | (config.early_stopping is True)))
        results[prompt_indices[done], : candidates.shape[-1]] = finished[done, 0]
        rows = (torch.arange(len(prompt_indices), device=parents.device)[:, None] * beams + parents)[~done].flatten()
        cache.reorder_cache(rows)
        attention_mask = pad(attention_mask[rows], (0, 1), value=1)
        tokens, scores, finished, best, prompt_indices = (
            t[~done] for t in (tokens, scores, finished, best, prompt_indices)
        )
    return results


def keep_best_texts(best: Tensor, finished: Tensor, scores: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of the ended texts so far and those that end now, best first, as many as so far.

    best: prompts x kept, with finished: prompts x kept x tokens. scores: prompts x beams, -inf for a text that
    continues, with texts: prompts x beams x tokens.
    """
    kept, order = torch.cat([best, scores], 1).topk(best.shape[1])
    return kept, torch.cat([finished, texts], 1).take_along_dim(order[..., None], 1)
