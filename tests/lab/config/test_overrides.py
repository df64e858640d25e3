"""Overrides in Hydra's grammar: each word means what Hydra documents, or is refused in one line; settings that would
have no effect are refused; and what is composed here is what Hydra composes."""

from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.commands.train import asks_hydra, check_command, train_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import GROUPS, compose_choices, load_settings
from dual_lora.lab.config.overrides import parse_overrides
from dual_lora.lab.config.paths import list_choices, load_yaml
from dual_lora.lab.config.recorded import ADDED_SETTINGS, load_old_defaults, load_recorded_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.study.experiment import drop_replaced_overrides
from tests.support.official_files import write_official
from tests.support.places import ROOT

ENCODER = ["model=tiny-roberta", "task=demo/sentiment"]
WRITER = ["model=tiny-llama", "task=demo/restaurants"]


def values(word: str) -> list[str]:
    """Return the values that a word asks for, each as text."""
    return [run[0].partition("=")[2] for run in parse_overrides([word])]


@pytest.mark.parametrize(
    ("word", "expected"),
    {
        "seed=0,1": ["0", "1"],
        "seed=choice(3,1)": ["3", "1"],
        "seed=range(3)": ["0", "1", "2"],
        "seed=range(5,0,-2)": ["5", "3", "1"],
        "seed=sort(3,1,2)": ["1", "2", "3"],
        "seed=sort(3,1,2,reverse=true)": ["3", "2", "1"],
        "seed=sort(shuffle(3,1,2))": ["1", "2", "3"],
        "method.rank=sort(range(4,11,4))": ["4", "8"],
        "method.rank=sort(range(4,11,4),reverse=true)": ["8", "4"],
        "method.rank=sort(range(10,1,-4))": ["2", "6", "10"],
        "method.magnitude_ratio=range(0.1,0.4,0.1)": ["0.1", "0.2", "0.3"],
        "method.magnitude_ratio=range(0.1,0.75,0.2)": ["0.1", "0.3", "0.5", "0.7"],
        "method.magnitude_ratio=sort(range(0.1,0.4,0.1),reverse=true)": ["0.3", "0.2", "0.1"],
        "method.alpha=float(range(1,4))": ["1.0", "2.0", "3.0"],
        "seed=int(choice(1.0,2))": ["1", "2"],
        "seed=tag(few,choice(1,2))": ["1", "2"],
        "method=glob(lora*)": ["lora", "lora_plus"],
        "model=glob(tiny-*,exclude=[*llama,*gpt2])": ["tiny-deberta", "tiny-roberta"],
        "study='a b'": ["'a b'"],
    }.items(),
)
def test_a_sweep_asks_for_the_values_that_hydra_documents(word, expected):
    assert values(word) == expected


def test_shuffled_values_are_all_there():
    assert sorted(values("seed=shuffle(range(0,20))"), key=int) == [str(n) for n in range(20)]
    assert sorted(values("seed=shuffle(a,b,c)")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("word", "message"),
    {
        "seed=interval(0,1)": "seed=interval(0,1): interval() names no values; runs need single values; write KEY=",
        "seed=tag(a,interval(0,1))": "seed=tag(a,interval(0,1)): interval() names no values",
        "seed=glob(*)": "seed=glob(*): glob() chooses among names of model, task, method, hardware; write",
        "method=glob(zz*)": "method=glob(zz*): matches no method; known: ",
        "seed=range(0,0)": "seed=range(0,0): an empty range gives no runs",
        "seed=shuffle(range(0,2)),5": "seed=shuffle(range(0,2)),5: a range, choice or sort cannot be one of several",
        "seed=5,range(0,2)": "seed=5,range(0,2): a range, choice or sort cannot be one of several values",
        "seed=range(3,0)": "seed=range(3,0): an empty range",
        "seed=range(0,3,0)": "seed=range(0,3,0): its step is 0; write KEY=range(START,STOP,STEP)",
        "seed=range(0,inf)": "seed=range(0,inf): Invalid literal",
        "seed=range(0,100000000)": "seed=range(0,100000000): asks for 100,000,000 runs, at most 10,000 at once",
        "seed=shuffle(range(0,1e300))": "seed=shuffle(range(0,1e300)): asks for 1,000,000,",
        "seed=sort(range(0,100000000),reverse=true)": "seed=sort(range(0,100000000),reverse=true): asks for 100,000,",
        "seed=sort(1,a)": "seed=sort(1,a): not of the form KEY=VALUE",
        "model.adapt=extend_list(q)": "model.adapt=extend_list(q): not of the form KEY=VALUE; extend_list() is no",
        "++method=lora": "++method: a choice; write method=NAME without the ++",
        "++zzz=1": "zzz: no such setting.",
        "method@foo=lora": "method@foo: settings have no packages; write method=VALUE",
        "hydra.sweeper.max_batch_size=0": "hydra.sweeper.max_batch_size: only hydra/launcher may be set",
        "hydra/sweeper=basic": "hydra/sweeper: only hydra/launcher may be set",
        "hydra.sweep.dir=x": "hydra.sweep.dir: only hydra/launcher may be set",
        "model.adapt=q,v": "model.adapt=q,v: must be a list; write model.adapt=[q,v]",
        "model.adapt=q": "model.adapt=q: must be a list; write model.adapt=[q]",
        "wandb.tags=range(1,3)": "wandb.tags=1,2: must be a list; write wandb.tags=[1,2]",
        "lr=1e-3": "lr: no such setting. Did you mean train.lr?",
        "rank=4": "rank: no such setting. Did you mean method.rank?",
        "batch_size=4": "batch_size: no such setting. Did you mean train.batch_size?",
        "model=bert-base-uncased": "model=bert-base-uncased: no such model. Any other is model=ORG/NAME,",
        "model=robrta-base": "model=robrta-base: no such model. Did you mean roberta-base? Any other is",
    }.items(),
)
def test_what_means_no_run_is_one_line(word, message):
    for refuse in (
        lambda: check_command(["-m", *drop_replaced_overrides([*ENCODER, word])]),
        lambda: sweep_command(["experiment=cost", "scale=smoke", "run=false", word]),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_product_of_sweeps_is_limited_before_it_is_listed():
    with pytest.raises(UserError, match="asks for 27,000,000 runs"):
        parse_overrides(["seed=range(0,300)", "method.rank=range(1,301)", "train.max_steps=range(1,301)"])


def test_two_pluses_override_what_is_there():
    assert parse_overrides(["++seed=3"]) == [["seed=3"]]
    assert load_settings(*parse_overrides([*ENCODER, "++method.rank=6"])).method.rank == 6
    twice = [*ENCODER, "++method.peft.kernel=eager"]
    assert load_settings(*parse_overrides(twice)).method.peft["kernel"] == "eager"
    with pytest.raises(UserError, match="method.rank=8: method.r1 and method.r2 make it 16"):
        load_settings(*parse_overrides([*ENCODER, "++method.rank=8", "method.r1=4", "method.r2=12"]))


@pytest.mark.parametrize(
    "words", [["--cfg", "job", "seed=1,2"], ["--cfg", "job", "-m", "seed=1"], ["--help", "seed=1"]]
)
def test_what_hydra_shows_is_one_run(words):
    with pytest.raises(UserError, match="shows one; give single|no such option here|--help: takes no other words"):
        asks_hydra(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resolve"], "--resolve: only with --cfg; --cfg job"),
        (["--cfg"], "--cfg: job shows the values of a run"),
        (["method=lora", "-c"], "--cfg: job shows the values of a run"),
        (["--cfg", "method=lora"], "--cfg method=lora: job shows"),
        (["--cfg", "all"], "--cfg all: job shows"),
        (["--info"], "--info: no such option; settings are KEY=VALUE"),
    ],
)
def test_an_option_that_shows_nothing_is_refused(words, message):
    with pytest.raises(UserError) as caught:
        train_command(words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [["--cfg", "job"], ["-c", "job", "--resolve"], ["--cfg=job"]])
def test_what_is_shown_of_a_run_are_its_settings(option, capsys):
    words = [*ENCODER, "method.r1=4", "method.r2=12"]  # which rank and magnitude_ratio follow from
    assert train_command([*words[:2], *option, *words[2:]]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == asdict(load_settings(words)) and shown["method"]["rank"] == 16
    assert shown["method"]["magnitude_ratio"] == shown["method"]["peft"]["magnitude_ratio"] == 0.25


CHOICES = [(group, name) for group in GROUPS for name in list_choices(group)]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_choices_are_composed_as_hydra_composes_them(group, name):
    default = {"model": "tiny-llama", "task": "demo/restaurants", "method": "dual_lora", "hardware": "single"}
    ours = compose_choices(paths.CONF, tuple((default | {group: name}).values()))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        theirs = compose("config", overrides=[f"{group}={name}"])
    assert OmegaConf.to_container(ours) == OmegaConf.to_container(theirs)


IDLE = {
    (*ENCODER, "method.lr_ratio=16"): "method.lr_ratio=16.0: only LoRA's B has a rate of its own, and method dual_lora",
    (*ENCODER, "method=full", "method.lr_ratio=16"): "method.lr_ratio=16.0: only LoRA's B",
    (*ENCODER, "method.lr=1", "train.lr=2"): "method.lr=1.0: train.lr=2.0 is used instead; drop one",
    (*ENCODER, "method.peft.r=8"): "method.peft.r=8: method dual_lora takes it from method.rank; set that",
    (*ENCODER, "method.r1=4", "method.r2=4", "method.magnitude_ratio=0.3"): "method.magnitude_ratio=0.3: method.r1 and",
    (*ENCODER, "task.num_beams=4"): "task.num_beams=4: demo/sentiment writes no text; drop it",
    (*ENCODER, "task.max_new_tokens=4"): "task.max_new_tokens=4: demo/sentiment writes no text",
    (*ENCODER, "task.no_repeat_ngram=4"): "task.no_repeat_ngram=4: demo/sentiment writes no text",
    (*ENCODER, "task.loss_on_prompt=true"): "task.loss_on_prompt=True: demo/sentiment writes no text",
    (*ENCODER, "task.stop=[x]"): "task.stop=['x']: demo/sentiment writes no text",
    (*ENCODER, "task.max_length=1"): "task.max_length=1: leaves next to nothing of a sentence",
    (*ENCODER, "task.epochs=2", "train.epochs=3"): "task.epochs=2.0: train.epochs is used instead; drop one",
    (*ENCODER, "task.batch_size=2", "train.batch_size=3"): "task.batch_size=2: train.batch_size is used instead",
    (
        *ENCODER,
        "train.schedule=constant",
        "task.warmup_ratio=0.5",
    ): "task.warmup_ratio=0.5: train.schedule=constant",
    (*ENCODER, "method=lora", "train.loss_scale=8"): "train.loss_scale=8.0: nothing in method lora clips gradients",
    (*ENCODER, "method=lora", "train={loss_scale:8}"): "train.loss_scale=8.0: nothing in method lora clips gradients",
    (
        *ENCODER,
        "+method.peft.direction=tanh",
        "+method.peft.ste=hardtanh",
    ): "method.peft.ste=hardtanh: only the gradient",
    (*ENCODER, "+method.peft.freeze=direction", "+method.peft.ste=identity"): "method.peft.ste=identity: only the grad",
    (
        *ENCODER,
        "+method.peft.direction=tanh",
        "train.loss_scale=8",
    ): "train.loss_scale=8.0: only the gradient of Sign is",
    (
        *ENCODER,
        "method.ramp_share=0",
        "+method.peft.scale_warmup_shape=root",
    ): "method.peft.scale_warmup_shape=root: ther",
    (
        *ENCODER,
        "method.peft.scale_warmup_steps=0",
        "+method.peft.scale_warmup_shape=root",
    ): "method.peft.scale_warmup_shape=root: there is no ramp",
    (
        *ENCODER,
        "+method.peft.freeze=direction",
        "+method.peft.direction_init_std=1",
    ): "method.peft.direction_init_std=1: the size of C and D",
    (
        *ENCODER,
        "+model.architecture.num_hidden_layers=1",
    ): "model.architecture.num_hidden_layers=1: only a plan uses it",
    (*ENCODER, "init_from=x", "method.ramp_share=0.9"): "method.ramp_share=0.9: init_from brings a trained adapter",
    (*ENCODER, "init_from=x", "+method.peft.init_std=1"): "method.peft.init_std=1: init_from brings a trained adapter",
    (*ENCODER, "init_from=x", "+method.peft.scale_warmup_shape=root"): "method.peft.scale_warmup_shape=root: init_from",
    (*ENCODER, "method=lora", "method.name=dora"): "method.name=dora: it names what the method's file sets",
    (
        *ENCODER,
        "method=lora",
        "+method.peft.target_modules=[query]",
        "model.adapt=[q,v]",
    ): "model.adapt=['q', 'v']: method.peft.target_modules is used instead; drop one",
    (
        *ENCODER,
        "method=lora",
        "method.peft.peft_type=LN_TUNING",
        "model.adapt=[q,v]",
    ): "model.adapt=['q', 'v']: LN_TUNING adapts other modules; drop it",
    (*ENCODER, "method=full", "model.adapt=[q]"): "model.adapt=['q']: method full trains every weight",
    (*ENCODER, "method=full", "model.roles.q=x"): "model.roles.q=x: method full trains every weight",
    (*ENCODER, "method=lora", "+model.roles.x=qqq"): "model.roles.x=qqq: model.adapt does not name the role x; drop it",
    (
        *ENCODER,
        "+model.roles={x:dense}",
    ): "model.roles.x=dense: model.adapt does not name the role x; drop it, or add it",
    (
        *ENCODER,
        "method=lora",
        "model.roles.q=foo",
        "model.adapt=[v]",
    ): "model.roles.q=foo: model.adapt does not name the role q",
    (
        *ENCODER,
        "method=lora",
        "model.roles.q=foo",
        "+method.peft.target_modules=[value]",
    ): "model.roles.q=foo: method.peft.target_modules is used instead; drop one",
    (*ENCODER, "model.revision=abc"): "model.revision=abc: tiny-roberta is read from this repository; drop it",
    (*WRITER, "model.head=[x]"): "model.head=['x']: demo/restaurants trains no head",
    (*WRITER, "task.length_penalty=2"): "task.length_penalty=2.0: only beam search uses it",
    (*ENCODER, "task.name=glue/rte"): "task.name=glue/rte: it names what the task's file sets",
    (*ENCODER, "method=lora", "+method.peft.fan_in_fan_out=true"): "method.peft.fan_in_fan_out=True: PEFT sets it by",
    (*ENCODER, "method=lora", "+method.peft.use_qalora=true"): "method.peft.use_qalora=True: only layers quantized by",
    (*ENCODER, "method=lora", "+method.peft.qalora_group_size=4"): "method.peft.qalora_group_size=4: only layers quan",
    (
        *ENCODER,
        "method=lora",
        "+method.peft.megatron_config={a:1}",
    ): "method.peft.megatron_config={'a': 1}: only layers",
    (
        *ENCODER,
        "method=loha",
        "+method.peft.use_effective_conv2d=true",
    ): "method.peft.use_effective_conv2d=True: only conv",
    (
        *ENCODER,
        "method=lora",
        "+method.peft.loftq_config.loftq_bits=4",
    ): "method.peft.loftq_config.loftq_bits=4: only read with method.peft.init_lora_weights=loftq",
    (*ENCODER, "method=oft", "+method.peft.eps=1e-3"): "method.peft.eps=0.001: only read with method.peft.coft=true",
    (
        *ENCODER,
        "method=oft",
        "+method.peft.use_cayley_neumann=false",
        "+method.peft.num_cayley_neumann_terms=3",
    ): "method.peft.num_cayley_neumann_terms=3: only read with method.peft.use_cayley_neumann=true",
    (
        *ENCODER,
        "method=randlora",
        "+method.peft.sparse=true",
        "+method.peft.very_sparse=true",
    ): "method.peft.sparse=True: only read with method.peft.very_sparse=false",
    (*ENCODER, "method=oft", "method.dropout=0.1"): "method.dropout=0.1: PEFT's OFT takes a dropout and applies none",
    (
        *ENCODER,
        "method=head_only",
        "+method.peft.use_dora=true",
    ): "method.peft.use_dora=True: method head_only adapts no",
    (*ENCODER, "method=head_only", "method.lr_ratio=8"): "method.lr_ratio=8.0: method head_only adapts no module",
    (
        *ENCODER,
        "method=head_only",
        "train.lr=1",
        "train.head_lr=2",
    ): "train.lr=1.0: only the head trains, at train.head_",
    (
        *ENCODER,
        "method=head_only",
        "method.lr=1",
        "train.head_lr=2",
    ): "method.lr=1.0: only the head trains, at train.he",
    (
        *ENCODER,
        "hardware.accelerator=h100-80gb",
    ): "hardware.accelerator=h100-80gb: only a plan uses it; drop it, or add",
    (*ENCODER, "task.train_rows=5"): "task.train_rows=5: only a plan uses it; drop it, or add plan=true",
    (
        *ENCODER,
        "+method.peft.init_weights=false",
        "method.ramp_share=0.5",
    ): "method.ramp_share=0.5: method.peft.init_weights=false starts at full scale",
    (
        *ENCODER,
        "+method.peft.init_weights=false",
        "method.peft.scale_warmup_steps=5",
    ): "method.peft.scale_warmup_steps=5: method.peft.init_weights=false starts at full scale",
    (
        *ENCODER,
        "+method.peft.kernel=triton",
        "+method.peft.direction=tanh",
    ): "method.peft.kernel=triton: method.peft.direction=tanh is computed by plain autograd",
    (
        *ENCODER,
        "model.dtype=bfloat16",
        "+method.peft.weight_gradient_dtype=bfloat16",
    ): "method.peft.weight_gradient_dtype=bfloat16: with model.dtype=bfloat16 gradients are in 16 bits anyway",
    (
        *ENCODER,
        "method=lora",
        "init_from=x",
        "+method.peft.init_lora_weights=gaussian",
    ): "method.peft.init_lora_weights=gaussian: init_from brings a trained adapter",
    (*ENCODER, "data_dir=."): "data_dir=.: demo/sentiment reads no files, it makes its own data; drop it",
}


@pytest.mark.parametrize("words", IDLE)
def test_a_setting_without_effect_is_refused(words):
    with pytest.raises(UserError) as caught:
        load_settings(list(words))
    assert str(caught.value).startswith(IDLE[words]) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [words for words, said in IDLE.items() if "only read with" in said])
def test_what_an_idle_field_needs_can_be_taken_as_it_is_printed(words):
    with pytest.raises(UserError) as caught:
        load_settings(list(words))
    option = str(caught.value).rpartition("or take ")[2]
    key = option.lstrip("+").partition("=")[0]
    load_settings([*(word for word in words if not word.lstrip("+").startswith(f"{key}=")), option])


@pytest.mark.parametrize(
    "words",
    [
        [*ENCODER, "method=lora_plus", "method.lr_ratio=16"],
        [*ENCODER, "method=lora", "method.lr_ratio=16"],
        [*ENCODER, "method.lr=1"],
        [*ENCODER, "task.num_beams=1", "task.epochs=3"],  # the value it has anyway
        [*ENCODER, "train.loss_scale=8"],
        [*ENCODER, "method.peft.scale_warmup_steps=9", "+method.peft.scale_warmup_shape=root"],
        [*ENCODER, "+method.peft.freeze=magnitude", "+method.peft.direction_init_std=1"],
        [*ENCODER, "+method.peft.ste=identity", "+method.peft.freeze=magnitude"],
        [*ENCODER, "init_from=x", "train.lr=1", "method.dropout=0.1"],
        [*ENCODER, "train.schedule=constant_with_warmup", "task.warmup_ratio=0.5"],
        [*ENCODER, "method=lora", "+method.peft.init_lora_weights=loftq", "+method.peft.loftq_config={loftq_bits: 4}"],
        [*ENCODER, "method=oft", "+method.peft.coft=true", "+method.peft.eps=1e-3"],
        [*ENCODER, "method=oft", "+method.peft.num_cayley_neumann_terms=3"],
        [*ENCODER, "method=loha", "method.dropout=0.1"],
        [*ENCODER, "method=head_only", "train.lr=1"],
        [*ENCODER, "method=none", "train.lr=1", "train.head_lr=2"],  # words that all methods share
        [*ENCODER, "method=head_only", "+method.peft.bias=all", "train.lr=1", "train.head_lr=2"],
        [*ENCODER, "+method.peft.freeze=direction", "+method.peft.direction=tanh", "+method.peft.direction_init_std=1"],
        [*ENCODER, "+method.peft.kernel=triton"],
        [*ENCODER, "+method.peft.kernel=eager", "+method.peft.direction=tanh"],
        [*ENCODER, "+method.peft.weight_gradient_dtype=bfloat16"],
        [*ENCODER, "method=pissa", "method.peft.init_lora_weights=true", "init_from=x"],
        [*ENCODER, "hardware.accelerator=h100-80gb", "plan=true"],
        [*WRITER, "task.num_beams=4", "task.length_penalty=2"],
    ],
)
def test_a_setting_with_an_effect_is_taken(words):
    load_settings(words)


def test_a_setting_that_a_method_does_not_name_is_refused_for_any_method(tmp_path, monkeypatch):
    """As in a yaml of one's own: what `peft` does not refer to has no effect."""
    for group in GROUPS:
        (tmp_path / group).mkdir()
    (tmp_path / "config.yaml").write_text((ROOT / "conf/config.yaml").read_text())
    for group, name in (("model", "tiny-roberta"), ("task", "demo/sentiment"), ("hardware", "single")):
        target = tmp_path / group / f"{name}.yaml"
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / "conf" / group / f"{name}.yaml").read_text())
    own = {"name": "own", "lr": 1e-3, "rank": 8, "peft": {"peft_type": "VERA", "r": "${method.rank}"}}
    (tmp_path / "method/own.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr(paths, "CONF", tmp_path)
    assert load_settings([*ENCODER, "method=own", "method.rank=4"]).method.peft["r"] == 4
    for word in ("method.dropout=0.1", "method.alpha=4"):
        with pytest.raises(UserError, match=f"^{word.partition('=')[0]}=.*: method own has no "):
            load_settings([*ENCODER, "method=own", word])


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("key", ["+method.peft.a", "+method.peft.init_std", "+task.options.x", "method.alpha"])
def test_no_number_is_infinite_wherever_it_stands(key, value):
    with pytest.raises(UserError, match="must be a finite number|must be positive|has no such option"):
        load_settings([*ENCODER, f"{key}={value}"])


def test_a_data_folder_one_level_too_deep_names_its_parent(tmp_path):
    write_official(tmp_path, "rte")
    words = ["model=tiny-roberta", "task=glue/rte"]
    assert load_settings([*words, f"data_dir={tmp_path}"]).data_dir == str(tmp_path)
    with pytest.raises(UserError, match=f"; give data_dir={tmp_path / 'glue'}$"):
        load_settings([*words, f"data_dir={tmp_path / 'glue' / 'RTE'}"])
    (tmp_path / "else").mkdir()
    with pytest.raises(UserError, match="below it; give data_dir="):
        load_settings([*words, f"data_dir={tmp_path / 'else'}"])


def bomb(lines: int) -> str:
    """Return YAML whose aliases make ten times as many values with each line."""
    names = "abcdefghijklmnopqrstuvwxyz"
    text = "a: &a [" + ", ".join(["x"] * 10) + "]\n"
    for before, name in zip(names, names[1:lines], strict=False):
        text += f"{name}: &{name} [" + ", ".join([f"*{before}"] * 10) + "]\n"
    return text


@pytest.mark.parametrize("text", [bomb(12), "a: &a [*a]", f"a: {'[' * 3000}"])
def test_yaml_that_has_no_end_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recorded_settings(tmp_path)
    assert "\n" not in str(caught.value)


def test_aliases_of_an_experiment_are_taken(tmp_path):
    (tmp_path / "x.yaml").write_text(bomb(3))
    assert len(OmegaConf.to_container(load_yaml(tmp_path / "x.yaml"))["c"]) == 10


def test_what_older_records_lack_is_what_conf_says():
    """All but the checkpoints by the clock, which runs of that time did not keep."""
    today, old = load_settings(["model=tiny-llama"]), load_old_defaults(paths.CONF)
    for key in ADDED_SETTINGS:
        mine = OmegaConf.select(old, key)
        assert mine is None or OmegaConf.is_config(mine) or mine in (False, "train")
    assert old.train.save_minutes is None and today.train.save_minutes == 10.0
    assert old.hardware == load_yaml(paths.CONF / "hardware" / "single.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/x/y"], "runs/x/y: not of the form KEY=VALUE; write run=runs/x/y"),
        (["run=a", "run=b"], "run: given twice; drop one"),
        (["run="], "run=: needs a value"),
        (["rum=x"], "rum: no such setting of "),
    ],
)
def test_words_of_eval(words, message):
    with pytest.raises(UserError) as caught:
        evaluate_command(words)
    assert str(caught.value).startswith(message)


def test_a_quoted_path_is_the_same_path(tmp_path):
    folder = tmp_path / "my runs, a=b #1"
    folder.mkdir()
    for word in (f"run={folder}", f"run='{folder}'", f'run="{folder}"'):
        with pytest.raises(UserError, match=f"^run={folder}: no config.yaml there"):
            evaluate_command([word])
    with pytest.raises(UserError, match="^experiment=no: no such experiment"):
        sweep_command(["experiment='no'"])
    with pytest.raises(UserError, match="^cost: not of the form KEY=VALUE; write experiment=cost"):
        sweep_command(["cost"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1", "seed=2"], "seed: given twice; drop one, or write seed=VALUE,VALUE for a run of each"),
        (["seed=1", "seed=1"], "seed: given twice"),
        (["seed=1", "++seed=2"], "seed: given twice"),
        (["seed=1,2", "seed=3"], "seed: given twice"),
        (["method=lora", "method=dora"], "method: given twice"),
        (["train.lr=1e-3", "train={lr:2e-3}"], "train.lr: given twice"),
        (["+method.peft.bias=all", "+method.peft.bias=none"], "method.peft.bias: given twice"),
        (["hydra/launcher=workstation", "hydra/launcher=slurm"], "hydra/launcher: given twice; drop one"),
    ],
)
def test_one_key_twice_is_refused(words, message):
    with pytest.raises(UserError) as caught:
        parse_overrides(words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_parts_of_one_group_are_not_one_key_twice():
    assert parse_overrides(["train.lr=1e-3", "train={epochs:2}", "seed=1"])


@pytest.mark.parametrize("own", fields(Settings), ids=lambda own: own.name)
def test_every_setting_of_every_group_is_checked_under_its_full_name(own):
    settings = load_settings([])
    group = getattr(settings, own.name)
    parts = {f"{own.name}.{f.name}": (group, f.name) for f in fields(group)} if is_dataclass(own.type) else {}
    for key, (values, name) in (parts or {own.name: (settings, own.name)}).items():
        with pytest.raises(UserError, match=f"^{key}=4294967296: must be below"):
            replace(values, **{name: 2**32})
