"""Three small tasks in a generated world, for trying the harness without downloading anything.

    demo/sentiment     classification: is a short review positive? Negation, contrast and hearsay decide it.
    demo/restaurants   data-to-text: say in one sentence what a meaning representation lists.
    demo/choice        multiple choice: pick the true one of two solutions to a question about the world.

All of it is drawn from the word lists below with a fixed seed. Validation holds something back: reviews that are not in
training, restaurants whose names are not, facts that training never asks about. `iterate_corpus` states those facts and
describes the same world in plain sentences; the bundled tiny models were pretrained on it.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tasks.base import Output, Row, Split, Task, TaskError

if TYPE_CHECKING:
    from tasks.measures import Score

SEED = 2512


def parse_word_lists(text: str) -> dict[str, list[str]]:
    """Return the word lists of "name: word, word; name: word, ..."."""
    pairs = (entry.split(": ") for entry in " ".join(text.split()).split("; "))
    return {name: words.split(", ") for name, words in pairs}


# Reviews. In a template, {yes} is a claim of the review's own polarity and {no} one of the other.

PLACES = parse_word_lists("""
    restaurant: food, service, soup, wine, menu, dessert; film: plot, acting, music, ending, dialogue, camera;
    hotel: room, bed, breakfast, view, staff, pool; book: story, style, opening, hero, language, humour""")
ADJECTIVES = parse_word_lists("""
    negative: bad, poor, awful, dull, weak, dreadful, annoying, boring, terrible, clumsy, tiresome, hopeless;
    positive: good, great, lovely, superb, charming, wonderful, fine, pleasant, brilliant, clever, witty, memorable""")
PLAIN = ("{}", "really {}", "very {}", "quite {}", "truly {}")
NEGATED = ("not at all {}", "anything but {}", "far from {}", "by no means {}", "not exactly {}")
REVIEWS = (
    "the {a} of the {place} was {yes} and the {b} was {yes}",
    "a {place} whose {a} was {yes}, and the {b} was {yes} too",
    "the {b} of the {place} was {yes}, as anyone will say who found the {a} {yes}",
    "i had heard that the {a} of the {place} was {yes}, and so it was",
    "a critic called the {a} of the {place} {yes}, and the critic was right",
    "a critic called the {a} of the {place} {no}, but the critic was wrong",
    "the {a} of the {place} was {no}, but the {b} was {yes} and that decided it",
    "although the {a} was {no}, the {b} of the {place} was {yes} and that is what counts",
    "what counts in a {place} is the {b}, and it was {yes}, even if the {a} was {no}",
    "the {b} was {yes}, which in a {place} matters more than the {a}, and the {a} was {no}",
)
OPPOSITE = {"negative": "positive", "positive": "negative"}

# Restaurants.

NAME_WORDS = parse_word_lists("""
    first: Blue, Red, Green, Golden, Silver, Old, Tiny, Happy, Quiet, Royal, Lucky, Wild, White, Black, Merry, Sly;
    last: Fig, Lantern, Anchor, Oak, Fox, Kettle, Table, Garden, Swan, Lemon, Bell, Drum, Heron, Olive, Wheel, Spoon""")
NAMES = [f"The {first} {last}" for first, last in itertools.product(*NAME_WORDS.values())]
SLOTS = parse_word_lists("""
    food: Italian, Indian, Greek, Thai, Mexican, French, Turkish, Japanese;
    area: old town, harbour, city centre, market square, valley, university quarter;
    price: cheap, affordable, moderate, expensive;
    near: Crown Bridge, North Station, Abbey Park, Castle Hill, Mill Lane, Union Theatre;
    rating: excellent, average, low""")
OPTIONAL = {"near": " near {}", "rating": " with {} ratings"}
SENTENCES = (
    "{name} serves {food} food at {price} prices in the {area}{near}{rating}.",
    "In the {area}{near}, {name} offers {price} {food} dishes{rating}.",
    "For {price} {food} food in the {area}{near}, try {name}{rating}.",
    "You can find {price} {food} cooking at {name} in the {area}{near}{rating}.",
    "{name} in the {area}{near} is a place{rating} for {food} food, and its prices are {price}.",
    "There is a restaurant{rating} in the {area}{near} called {name}; it is {price} and cooks {food} food.",
)
REMARKS = {
    "food": "{name} cooks {food} food.",
    "area": "{name} is in the {area}.",
    "price": "The prices of {name} are {price}.",
    "near": "{name} is near {near}.",
    "rating": "The ratings of {name} are {rating}.",
}

# Facts: every member belongs to one group of its relation.


@dataclass(frozen=True)
class Relation:
    """Groups with their members, and the words that state and ask who belongs where."""

    statements: tuple[str, ...]
    ask_group: str
    ask_member: str
    groups: dict[str, list[str]]


RELATIONS = (
    Relation(
        ("the {group} sells {member}", "you can buy {member} at the {group}", "for {member} people go to the {group}"),
        "which shop sells {member}?",
        "what can you buy at the {group}?",
        parse_word_lists("""bakery: bread, rolls, buns, pies, pastries; pharmacy: pills, bandages, plasters, vitamins;
            bookshop: novels, atlases, diaries, comics; butcher: sausages, ham, bacon, steaks;
            florist: roses, tulips, lilies, wreaths; jeweller: rings, necklaces, bracelets, pearls;
            garage: tyres, engine oil, wipers, fuel; toy shop: dolls, puzzles, marbles, kites;
            dairy: milk, butter, cheese, cream; grocer: apples, carrots, onions, lettuce;
            cobbler: boots, sandals, slippers, laces; stationer: paper, envelopes, ink, rulers"""),
    ),
    Relation(
        ("a {group} is used to {member}", "to {member} you need a {group}", "people {member} with a {group}"),
        "what is used to {member}?",
        "what do people do with a {group}?",
        parse_word_lists("""knife: slice meat, peel pears, chop herbs, carve wood;
            broom: sweep the floor, clear leaves, remove dust;
            needle: sew buttons, mend shirts, stitch hems, darn socks; kettle: boil water, make tea, warm the pot;
            spade: dig holes, turn the soil, plant trees, lift roots; pen: write letters, sign forms, take notes;
            saw: cut planks, trim branches, shorten poles; towel: dry hands, wipe plates, soak up water;
            camera: take photos, record scenes, shoot portraits; lamp: light the room, read at night, see in the dark;
            ladder: reach the roof, climb walls, pick cherries; hammer: drive nails, crack stones, bend metal"""),
    ),
    Relation(
        ("the {member} lives in the {group}", "the {group} has the {member}", "the {group} is home of the {member}"),
        "where does the {member} live?",
        "which animal lives in the {group}?",
        parse_word_lists("""desert: camel, scorpion, lizard, jackal; jungle: tiger, parrot, monkey, python;
            sea: whale, shark, dolphin, squid; river: otter, beaver, trout, heron;
            ice: penguin, seal, walrus, polar bear;
            farm: cow, hen, pig, sheep; forest: deer, fox, owl, squirrel; mountains: goat, eagle, marmot, ibex;
            savanna: lion, zebra, giraffe, elephant; pond: frog, newt, duck, carp"""),
    ),
    Relation(
        ("{member} is a kind of {group}", "one {group} is {member}", "people know {member} as a {group}"),
        "what kind of thing is {member}?",
        "which of these is a {group}?",
        parse_word_lists("""fruit: plum, peach, cherry, melon; tree: birch, pine, willow, maple;
            sport: tennis, rugby, cricket;
            metal: iron, copper, gold, zinc; vehicle: lorry, tram, van, taxi; garment: coat, scarf, skirt, jacket;
            dance: waltz, tango, polka, samba; fabric: silk, linen, cotton, velvet; game: chess, poker, draughts, bingo;
            colour: crimson, beige, navy, turquoise"""),
    ),
)
Fact = tuple[Relation, str, str]
FACTS = [(relation, g, m) for relation in RELATIONS for g, members in relation.groups.items() for m in members]
INSTRUCTION = """Please choose the correct solution to the question: {question}

Solution1: {first}

Solution2: {second}

Answer format: solution1/solution2
"""


# Drawing


def write_claim(rng: random.Random, polarity: str) -> str:
    """Return words for a quality, now and then by denying the opposite one."""
    if rng.random() < 0.75:
        return rng.choice(PLAIN).format(rng.choice(ADJECTIVES[polarity]))
    return rng.choice(NEGATED).format(rng.choice(ADJECTIVES[OPPOSITE[polarity]]))


def write_review(rng: random.Random, polarity: str) -> str:
    """Return one review, "positive" or "negative" on the whole."""
    place = rng.choice(list(PLACES))
    a, b = rng.sample(PLACES[place], 2)
    text = rng.choice(REVIEWS).format(a=a, b=b, place=place, yes="{yes}", no="{no}")
    meant = {"{yes}": polarity, "{no}": OPPOSITE[polarity]}
    return re.sub("{yes}|{no}", lambda found: write_claim(rng, meant[found[0]]), text)


def draw_restaurant(rng: random.Random, names: list[str]) -> dict[str, str]:
    """Return a meaning representation, name first, with or without each optional slot."""
    slots = [slot for slot in SLOTS if slot not in OPTIONAL or rng.random() < 0.5]
    return {"name": rng.choice(names)} | {slot: rng.choice(SLOTS[slot]) for slot in slots}


def linearize_slots(slots: dict[str, str]) -> str:
    """Return "name : The Blue Fig | food : Italian | ..."."""
    return " | ".join(f"{slot} : {value}" for slot, value in slots.items())


def list_sentences(slots: dict[str, str]) -> list[str]:
    """Return every sentence of the grammar that says what `slots` lists."""
    clauses = {slot: words.format(slots[slot]) if slot in slots else "" for slot, words in OPTIONAL.items()}
    return [template.format(**slots | clauses) for template in SENTENCES]


def write_statement(rng: random.Random, fact: Fact) -> str:
    """Return one plain clause that states `fact`."""
    relation, group, member = fact
    return rng.choice(relation.statements).format(group=group, member=member)


def write_question(rng: random.Random, fact: Fact) -> tuple[str, str, str]:
    """Return a question about `fact`, its right answer and a wrong one; it asks for the group or for the member."""
    relation, group, member = fact
    other = rng.choice([name for name in relation.groups if name != group])
    if rng.random() < 0.5:
        return relation.ask_group.format(member=member), group, other
    return relation.ask_member.format(group=group), member, rng.choice(relation.groups[other])


def split_at_random(items: list, share: float) -> dict[str, list]:
    """Return `items` split at random into a training part and the `share` kept for validation."""
    shuffled = random.Random(SEED).sample(items, len(items))
    count = round(len(items) * share)
    return {"train": shuffled[count:], "validation": shuffled[:count]}


NAMES_OF = split_at_random(NAMES, share=0.2)
FACTS_OF = split_at_random(FACTS, share=0.25)


class Demo(Task):
    """What the three tasks share: rows drawn from the seed, no prompt twice."""

    version = 1
    sizes: dict[str, int]

    def draw(self, rng: random.Random, split: str, index: int) -> Row:
        """Return the row number `index` of `split`, without its id."""
        raise NotImplementedError

    def split(self, name: str, data_dir: str | None = None) -> Split:
        """Return the generated rows of a split; `data_dir` is not used.

        Raises:
            TaskError: there is no such split.
        """
        if name not in self.sizes:
            raise TaskError(f"{self.name} has no split {name!r}, only {' and '.join(self.sizes)}")
        return Split(self.dataset(self.draw_rows()[name], self.name), self.source()["generator"])

    @classmethod
    @cache
    def draw_rows(cls) -> dict[str, list[Row]]:
        """Return the rows of every split, which are not to be changed."""
        task, rng, splits, seen = cls(), random.Random(SEED), {}, set()
        for split, size in cls.sizes.items():
            rows = splits[split] = []
            while len(rows) < size:
                row = task.draw(rng, split, len(rows))
                shown = row.get("prompt", row.get("text"))
                if shown not in seen:
                    seen.add(shown)
                    rows.append({"id": f"{split}-{len(rows)}"} | row)
        return splits

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        return {"generator": f"tasks/demo.py v{self.version}"}


class Sentiment(Demo):
    """Positive or negative? Half of the reviews are each."""

    name = "demo/sentiment"
    form = "classification"
    labels = ("negative", "positive")
    metric = "accuracy"
    sizes = {"train": 2000, "validation": 200}

    def draw(self, rng: random.Random, split: str, index: int) -> Row:
        label = index % 2
        return {"text": write_review(rng, self.labels[label]), "text_pair": "", "label": label}

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        rows = results["validation"]
        return {"accuracy": float(accuracy_score([row["gold"] for row in rows], [row["answer"] for row in rows]))}

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        return declare_accuracy()


class Restaurants(Demo):
    """A meaning representation to one sentence; every sentence of the grammar that says the same is accepted."""

    name = "demo/restaurants"
    form = "generation"
    metric = "bleu"
    sizes = {"train": 2000, "validation": 100}

    def draw(self, rng: random.Random, split: str, index: int) -> Row:
        slots = draw_restaurant(rng, NAMES_OF[split])
        accepted = list_sentences(slots)
        return {"prompt": linearize_slots(slots) + " ||\n", "target": rng.choice(accepted), "references": accepted}

    def judge(self, row: Row, output: Output) -> Row:
        answer = output.strip()
        values = re.findall(r" : (.+?) \|", row["prompt"])
        complete = all(value in answer for value in values)
        return {"answer": answer, "gold": row["target"], "references": row["references"], "slots": complete}

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        import sacrebleu

        rows = results["validation"]
        streams = list(zip(*(row["references"] for row in rows), strict=True))
        bleu = sacrebleu.corpus_bleu([row["answer"] for row in rows], streams).score / 100
        return {"bleu": min(bleu, 1.0), "slot_accuracy": sum(row["slots"] for row in rows) / len(rows)}

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        from tasks import measures

        return {"bleu": measures.Bleu(lowercase=False, smooth=True).score()}


class Choice(Demo):
    """Which of two solutions is true? The first "solution1" or "solution2" of the output is the answer."""

    name = "demo/choice"
    form = "generation"
    metric = "accuracy"
    lower_is_better = ("unanswered",)
    sizes = {"train": 2000, "validation": 200}

    def draw(self, rng: random.Random, split: str, index: int) -> Row:
        asked, right, wrong = write_question(rng, rng.choice(FACTS_OF[split]))
        first, second = (right, wrong) if index % 2 == 0 else (wrong, right)
        target = f"the correct answer is solution{index % 2 + 1}"
        prompt = INSTRUCTION.format(question=asked, first=first, second=second)
        return {"prompt": prompt, "target": target, "references": [target]}

    def judge(self, row: Row, output: Output) -> Row:
        found = re.search("solution[12]", output)
        return {"answer": found and found[0], "gold": row["target"].split()[-1]}

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        rows = results["validation"]
        right = sum(row["answer"] == row["gold"] for row in rows)
        unanswered = sum(row["answer"] is None for row in rows)
        return {"accuracy": right / len(rows), "unanswered": unanswered / len(rows)}

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        return declare_accuracy()


def declare_accuracy() -> "dict[str, Score]":
    """Return how to recompute the share of right answers on resampled rows."""
    from tasks import measures

    return {"accuracy": measures.Score(measures.mark_correct, measures.mean)}


SUBSETS = {"sentiment": Sentiment, "restaurants": Restaurants, "choice": Choice}


def task(subset: str) -> Task:
    """Return the demo task `subset`.

    Raises:
        TaskError: there is no such task.
    """
    if subset not in SUBSETS:
        raise TaskError(f"no task demo/{subset}; the demo tasks are {', '.join(SUBSETS)}")
    return SUBSETS[subset]()


# What the bundled models are pretrained on


def write_review_text(rng: random.Random) -> str:
    """Return a review with a word that sums it up, or words of one polarity side by side."""
    polarity = rng.choice(list(OPPOSITE))
    words = rng.sample(ADJECTIVES[polarity], 3)
    if rng.random() < 0.3:
        return "this {} was {}, {} and {}.".format(rng.choice(list(PLACES)), *words)
    return f"{write_review(rng, polarity)}. all in all {words[0]}."


def write_restaurant_text(rng: random.Random) -> str:
    """Return a restaurant in a sentence, or as a record with remarks on some of it."""
    slots = draw_restaurant(rng, NAMES_OF["train"])
    if rng.random() < 0.4:
        return rng.choice(list_sentences(slots))
    remarks = [words.format(**slots) for slot, words in REMARKS.items() if slot in slots]
    return linearize_slots(slots) + "\n" + " ".join(rng.sample(remarks, 2))


def write_facts(rng: random.Random) -> str:
    """Return one to three facts."""
    return ". ".join(write_statement(rng, fact) for fact in rng.sample(FACTS, rng.randint(1, 3))) + "."


def write_answered_question(rng: random.Random) -> str:
    """Return a question with its answer; of the facts that training asks about, also with the answer's number."""
    if rng.random() < 0.2:
        asked, right, _ = write_question(rng, rng.choice(FACTS))
        return f"{asked} the correct answer is {right}."
    asked, right, wrong = write_question(rng, rng.choice(FACTS_OF["train"]))
    names = rng.sample((right, wrong), 2)
    return f"{asked} 1: {names[0]} 2: {names[1]} the answer is {names.index(right) + 1}."


def write_lookup(rng: random.Random) -> str:
    """Return a numbered list of things with the numbers of two of them."""
    names = [rng.choice(fact[1:]) for fact in rng.sample(FACTS, rng.randint(2, 4))]
    listing = "\n\n".join(f"Solution{number}: {name}" for number, name in enumerate(names, start=1))
    found = " ".join(f"{name} is solution{names.index(name) + 1}." for name in rng.sample(names, 2))
    return f"{listing}\n\n{found}"


WRITERS = {
    writer.__name__: writer
    for writer in (write_review_text, write_restaurant_text, write_facts, write_answered_question, write_lookup)
}


def iterate_corpus(kinds: dict[str, int], size: int = 60_000, seed: int = SEED) -> Iterator[str]:
    """Yield distinct short texts of the world, of each kind in WRITERS as often as its weight in `kinds` says.

    None holds a review, a restaurant or a prompt of a validation split.
    """
    rng = random.Random(seed)
    kept_back = set(Sentiment().split("validation").rows["text"])
    seen = set()
    while len(seen) < size:
        text = WRITERS[rng.choices(list(kinds), list(kinds.values()))[0]](rng)
        if text not in seen and text.split(".")[0] not in kept_back:
            seen.add(text)
            yield text
