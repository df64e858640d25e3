"""Training a small Llama: autocast, torch.compile, activation checkpointing, the Trainer, resume."""

import copy

import pytest
import torch
import torch._dynamo.testing
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from dual_lora import DualLoraConfig, DualLoraWarmupCallback
from dual_lora.tuner.warmup import list_factors
from tests.tuner.tiny_llama import adapted, batches, llama, trained

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train(model, data, context=None, lr=1e-2):
    optimizer = torch.optim.AdamW(trained(model), lr=lr)
    losses = []
    for ids in data:
        with context() if context else torch.enable_grad():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def steps_of(model):
    return {int(f.step) for f in list_factors(model)}


def test_it_learns():
    losses = train(adapted(scale_warmup_steps=10), batches(1) * 40)
    assert losses[-1] < losses[0] - 0.3  # LoRA falls by 0.6


def test_default_targets_and_lora_s_parameter_count():
    dual = get_peft_model(llama(), DualLoraConfig(r=6, magnitude_ratio=0.3))
    lora = get_peft_model(llama(), LoraConfig(r=6))
    assert dual.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_in_forward_only(dtype, base_dtype):
    """Backward runs outside autocast, as it should; the big product stays in 16 bits."""
    if base_dtype == torch.bfloat16 and dtype == torch.float16:
        pytest.skip("a mixture nobody trains in")
    model = adapted(llama().to(base_dtype), scale_warmup_steps=0)
    plain = copy.deepcopy(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    seen = []
    layer.dual_lora_factors["default"].register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    ids = batches(1)[0]
    with torch.autocast("cpu", dtype):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert seen == [dtype]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained(model))
    if base_dtype == torch.float32:
        plain(input_ids=ids, labels=ids).loss.backward()
        for p, q in zip(trained(model), trained(plain), strict=True):
            assert (p.grad - q.grad).norm() < 0.15 * q.grad.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    data = batches(5)
    model = adapted(lora_dropout=0.1)
    twin = copy.deepcopy(model)
    twin.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.enable_input_require_grads()
    torch.manual_seed(1)
    expected = train(model.train(), data)
    torch.manual_seed(1)
    assert train(twin.train(), data) == pytest.approx(expected, rel=1e-5)
    assert steps_of(twin) == steps_of(model) == {3}


def compiled(model):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter), counter


def test_compile_does_not_recompile_over_the_ramp():
    """Nor does an adapter split the graph: old releases of transformers do that themselves, so a plain model counts."""
    data = batches(6)
    torch._dynamo.reset()
    plain, plain_graphs = compiled(llama())
    train(plain, data[:1])
    torch._dynamo.reset()
    model = adapted(scale_warmup_steps=4, target_modules=r".*(_proj|embed_tokens)")
    twin, graphs = compiled(copy.deepcopy(model).base_model.model)
    expected = train(model, data)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train(twin, data) == pytest.approx(expected, rel=1e-5)
    assert graphs.frame_count == plain_graphs.frame_count
    assert steps_of(twin) == {4}


def test_accumulated_gradients_equal_the_whole_batch():
    """At every f of the ramp; the mean of two half batches is the whole batch."""
    data = batches(5)
    whole, halves = adapted(), None
    halves = copy.deepcopy(whole)
    train(whole, data, lr=1e-3)
    optimizer = torch.optim.AdamW(trained(halves), lr=1e-3)
    for ids in data:
        for half in ids.chunk(2):
            (halves(input_ids=half, labels=half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert steps_of(halves) == {3}
    for p, q in zip(trained(whole), trained(halves), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=48):
        self.ids = torch.cat(batches(n // 4))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model, folder, **arguments):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    callbacks = [DualLoraWarmupCallback()] if arguments.pop("callback", False) else []
    return Trainer(model, TrainingArguments(**arguments), train_dataset=Rows(), callbacks=callbacks)


@pytest.mark.parametrize("callback", [False, True])
def test_trainer_counts_optimizer_steps(tmp_path, callback):
    model = adapted(scale_warmup_steps=10)
    trainer(model, tmp_path, callback=callback).train()
    assert steps_of(model) == {6}


def test_resume_is_exact(tmp_path):
    base = llama()
    start = adapted(copy.deepcopy(base), scale_warmup_steps=5)
    straight, resumed = copy.deepcopy(start), copy.deepcopy(start)
    trainer(straight, tmp_path).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for p, q in zip(trained(straight), trained(resumed), strict=True):
        torch.testing.assert_close(p, q)
    assert steps_of(resumed) == {5}
    saved = PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-3"))
    assert steps_of(saved) == {3} and {round(float(f.update_scale), 6) for f in list_factors(saved)} == {0.6}


def test_tied_embeddings_merge_exactly():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for targets in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        peft_model = adapted(copy.deepcopy(model), target_modules=targets, scale_warmup_steps=0, init_std=0.2).eval()
        ids = batches(1)[0]
        y = peft_model(input_ids=ids).logits
        names = set(peft_model.state_dict())
        peft_model.merge_adapter()
        assert set(peft_model.state_dict()) == names
        torch.testing.assert_close(peft_model(input_ids=ids).logits, y)
        peft_model.unmerge_adapter()
        inner = peft_model.base_model.model
        assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
        torch.testing.assert_close(peft_model.merge_and_unload()(input_ids=ids).logits, y)


def test_a_layer_adapted_while_its_tied_partner_is_merged_merges_exactly(tmp_path):
    """Merged, the partner has a weight of its own; the tie shows only in the weight that it has set aside."""
    fields = {"scale_warmup_steps": 0, "init_std": 0.2}
    head = adapted(llama(tie_word_embeddings=True), target_modules=["lm_head"], **fields)
    head.save_pretrained(tmp_path, save_embedding_layers=False)
    model = adapted(llama(tie_word_embeddings=True), target_modules=["embed_tokens"], **fields)
    inner, ids = model.base_model.model, batches(1)[0]
    model.merge_adapter()
    model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    y = model.eval()(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, y)
    model.unmerge_adapter()
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
