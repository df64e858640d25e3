"""How similar a finished run's updates are to those of other runs of the same model, such as full tuning.

In addition to cosine and sign agreement, it is measured how far each update changes size and direction of a weight's
rows. By their correlation over layers DoRA (arXiv 2402.09353, section 3.2) tells methods apart.
"""

from torch import Tensor

from dual_lora import analysis
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require
from dual_lora.lab.record.record import SIMILARITY_FILE, Record
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.weights.updates import Update, check_changed, find_layer_number, find_role, load_updates

MEASURES = ("cosine", "sign_agreement")  # keys of `compare_updates`


def measure_similarity(
    settings: Settings, record: Record, references: dict[str, tuple[Settings, Record] | None]
) -> None:
    """Compare a finished run's updates with those of other runs and write the result into its folder.

    references: the other runs by what they are called, None where there is none.

    Raises:
        UserError: there is no other run, one cannot be loaded, its dW is not known, or no weight changed in both.
    """
    silence_libraries()
    where = f"run={record.format_path()}"
    require(any(references.values()), f"{where}: no other run to compare it with; add a seed to the experiment")
    digests = {other[1].name: other[1].read_digest() for other in references.values() if other}
    mine = load_updates(settings, record)
    check_changed(mine, settings, record)
    others = {
        name: other and {update.module: update for update in load_updates(*other)} for name, other in references.items()
    }
    for name, changes in others.items():
        shares_weights = changes is None or any(update.module in changes for update in mine)
        require(shares_weights, f"{where}: {name}: that run changed none of the weights that this one changed")
    content = {
        "run": record.name,
        "references": {name: other and other[1].name for name, other in references.items()},
        "digests": digests,
        "rows": [describe_similarity(update, others, settings) for update in mine],
    }
    record.write_sealed(SIMILARITY_FILE, content)


def describe_similarity(
    update: Update, others: dict[str, dict[str, Update] | None], settings: Settings
) -> dict[str, object]:
    """Return the row of one weight. Each number with a reference is a dictionary by the references' names; `null` is
    that of random factors with the first reference there is. None: the reference did not change this weight."""
    dW, W0 = update.get_change(), update.get_weight()
    found = {name: compare_with(dW, update, changes) for name, changes in others.items()}
    first = next(changes for changes in others.values() if changes is not None)
    found["null"] = compare_with(update.draw_null("cpu")[0], update, first)
    return {
        "module": update.name,
        "role": find_role(update.module, settings) + update.name.removeprefix(update.module),
        "layer": find_layer_number(update.module),
        **{key: {name: values and values[key] for name, values in found.items()} for key in MEASURES},
        **analysis.measure_decomposition(W0, dW),
    }


def compare_with(dW: Tensor, update: Update, changes: dict[str, Update] | None) -> dict[str, float | None] | None:
    """Return how similar dW (out x in) is to another run's update of the same weight; None where there is none."""
    other = (changes or {}).get(update.module)
    return other and analysis.compare_updates(dW, other.get_full_change()[update.block].to(dW))
