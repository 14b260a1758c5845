"""The small world that the shipped tiny model is trained on: facts, questions, answers, stories.

`World(seed)` fixes who does what in the harbour town of Saltmere; everything else here turns those
facts into text. Owns no tokens and no arrays. A question belongs to the held-out set by a hash of
its words alone, so a (fact, phrasing) pair is either never trained on or never tested on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

from tiny_world_templates import TEMPLATES
from tiny_world_words import (
    ANIMALS,
    BOATS,
    CARGO,
    COLOURS,
    DAYS,
    FOODS,
    GOODS,
    HOBBIES,
    OPENERS,
    PEOPLE,
    PET_NAMES,
    PETS,
    PIRATE_SYSTEMS,
    PLACES,
    SOCIAL,
    STREETS,
    SYSTEMS,
    THINGS,
    TRADES,
    UNKNOWN_NAMES,
    WEATHER,
)

Message = dict[str, str]
Document = str | list[Message]
"""Plain text, or the messages of a dialogue."""


@dataclasses.dataclass(frozen=True)
class Person:
    """One inhabitant; attributes are ready to stand in a sentence ("in Herring Lane", "a cat")."""

    name: str
    he: str
    trade: str
    home: str
    pet: str
    pet_name: str
    food: str
    colour: str
    hobby: str


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that is so.

    Attributes:
      kind: Group, a key of `TEMPLATES` (or "social", "unknown").
      questions: Ways to ask for it.
      answer: The one answer.
      statements: Ways to say it outside of a dialogue.
    """

    kind: str
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...] = ()


def is_held_out(question: str) -> bool:
    """Whether a question is kept for testing (one in ten, by hash)."""
    return zlib.crc32(question.encode()) % 10 == 0


def _deal(rng: random.Random, values: tuple[str, ...], count: int) -> list[str]:
    """`count` values in random order, each used about equally often."""
    dealt = list(itertools.islice(itertools.cycle(values), count))
    rng.shuffle(dealt)
    return dealt


class World:
    """All facts of Saltmere.

    Attributes:
      people: The inhabitants.
      weather: Weather by day of the week.
      facts: Every fact, with its questions.
      by_kind: The same facts by kind.
    """

    def __init__(self, seed: int):
        rng = random.Random(f"world {seed}")
        count = len(PEOPLE)
        columns = [
            _deal(rng, v, count)
            for v in (TRADES, STREETS, PETS, PET_NAMES, FOODS, COLOURS, HOBBIES)
        ]
        self.people = [
            Person(name, he, *row)
            for (name, he), row in zip(PEOPLE, zip(*columns, strict=True), strict=True)
        ]
        self.weather = dict(zip(DAYS, _deal(rng, WEATHER, len(DAYS)), strict=True))
        self.facts: list[Fact] = []
        for person in self.people:
            self._add_person(person, rng)
        self._add_town(rng)
        self._add_numbers()
        for questions, answer in SOCIAL:
            self.facts.append(Fact("social", questions, answer))
        for name in UNKNOWN_NAMES:
            questions = tuple(q.format(name=name) for q in TEMPLATES["unknown"][0])
            self.facts.append(Fact("unknown", questions, TEMPLATES["unknown"][1]))
        self.by_kind: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_kind.setdefault(fact.kind, []).append(fact)

    def _add(self, kind: str, **slots: object) -> None:
        questions, answer, statements = TEMPLATES[kind]

        def fill(template: str) -> str:
            text = template.format(**slots)
            return text[0].upper() + text[1:]

        # A set of the filled texts, in order: two phrasings may coincide for some slots.
        asked = tuple(dict.fromkeys(fill(q) for q in questions))
        self.facts.append(Fact(kind, asked, fill(answer), tuple(fill(s) for s in statements)))

    def _add_person(self, p: Person, rng: random.Random) -> None:
        slots = dataclasses.asdict(p)
        kinds = ["trade", "who", "home", "pet", "pet_owner", "food", "colour", "hobby"]
        kinds += ["trade_home", "trade_food", "trade_colour", "trade_pet"]
        for kind in kinds:
            self._add(kind, **slots)
        for kind, values in (("trade", TRADES), ("pet", PETS)):
            right = getattr(p, kind)
            wrong = rng.sample([v for v in values if v != right], 3)
            self._add(f"yes_{kind}", **slots)
            for other in wrong:
                self._add(f"no_{kind}", other=other, **slots)

    def _add_town(self, rng: random.Random) -> None:
        for place, where, activity in PLACES:
            self._add("place_where", place=place, where=where)
            self._add("place_use", place=place, activity=activity)
        for animal, sound, meal, den in ANIMALS:
            self._add("sound", animal=animal, sound=sound)
            self._add("meal", animal=animal, meal=meal)
            self._add("den", animal=animal, den=den)
        for thing, colour in THINGS:
            self._add("thing", thing=thing, colour=colour)
        goods = _deal(rng, GOODS, len(DAYS))
        for i, day in enumerate(DAYS):
            self._add("weather", day=day, weather=self.weather[day])
            self._add("market", day=day, goods=goods[i])
            self._add("day_after", day=day, other=DAYS[(i + 1) % 7])
            self._add("day_before", day=day, other=DAYS[(i - 1) % 7])
        owners = rng.sample([p.name for p in self.people], len(BOATS))
        paints, loads = _deal(rng, COLOURS, len(BOATS)), _deal(rng, CARGO, len(BOATS))
        for boat, owner, paint, load in zip(BOATS, owners, paints, loads, strict=True):
            self._add("boat_owner", boat=boat, owner=owner)
            self._add("boat_colour", boat=boat, colour=paint)
            self._add("boat_load", boat=boat, load=load)

    def _add_numbers(self) -> None:
        for a in range(11):
            for b in range(11):
                self._add("plus", a=a, b=b, c=a + b)
                self._add("minus", a=a + b, b=b, c=a)
        for a in range(20):
            self._add("after", a=a, c=a + 1)
            self._add("before", a=a + 1, c=a)

    def held_out(self, count: int, seed: int = 0) -> list[tuple[str, str, str]]:
        """Returns up to `count` (kind, question, answer) that no training text contains.

        Kinds take turns, so that each is tested as often as the others while it lasts.
        """
        rng = random.Random(f"held out {seed}")
        queues = []
        for kind, facts in self.by_kind.items():
            if kind == "social":  # every phrasing is its own; there is nothing to generalize from
                continue
            queue = [(kind, q, f.answer) for f in facts for q in f.questions if is_held_out(q)]
            rng.shuffle(queue)
            queues.append(queue)
        rounds = itertools.zip_longest(*queues)
        return [item for row in rounds for item in row if item is not None][:count]


class Writer:
    """An endless, seeded source of documents about a world."""

    def __init__(self, world: World, seed: int):
        self.world = world
        self.rng = random.Random(f"writer {seed}")
        self.kinds = list(world.by_kind)
        # Between "every kind alike" and "every fact alike"; the many sums do not drown the rest.
        self.kind_weights = [len(world.by_kind[kind]) ** 0.8 for kind in self.kinds]

    def documents(self, chat_share: float = 0.8) -> Iterator[Document]:
        """Yields documents, `chat_share` of them dialogues."""
        plain = (self.statements, self.portrait, self.story, self.quote)
        while True:
            if self.rng.random() < chat_share:
                yield self.dialogue()
            else:
                yield self.rng.choices(plain, (4, 2, 2, 1))[0]()

    def fact(self) -> Fact:
        """Draws a fact."""
        kind = self.rng.choices(self.kinds, self.kind_weights)[0]
        return self.rng.choice(self.world.by_kind[kind])

    def question(self, fact: Fact) -> str:
        """Draws a way to ask for a fact, never a held-out one."""
        allowed = fact.questions
        if fact.kind != "social":
            allowed = tuple(q for q in allowed if not is_held_out(q))
        question = self.rng.choice(allowed)
        style = self.rng.random()
        if style < 0.1:
            return self.rng.choice(OPENERS) + question
        if style < 0.15:
            return question[0].lower() + question[1:].rstrip("?.")
        return question

    def dialogue(self) -> list[Message]:
        """One to four questions and answers, sometimes under a system message.

        Some of those ask for a pirate; without one, nobody answers like that.
        """
        messages: list[Message] = []
        voice = self.rng.random()
        if voice < 0.2:
            systems = PIRATE_SYSTEMS if voice < 0.1 else SYSTEMS
            messages.append({"role": "system", "content": self.rng.choice(systems)})
        for _ in range(self.rng.choices((1, 2, 3, 4), (6, 3, 2, 1))[0]):
            fact = self.fact()
            answer = pirate(fact.answer) if voice < 0.1 else fact.answer
            messages.append({"role": "user", "content": self.question(fact)})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def statements(self) -> str:
        """Two to five unrelated facts, said plainly."""
        said = [f for f in (self.fact() for _ in range(12)) if f.statements]
        return " ".join(self.rng.choice(f.statements) for f in said[: self.rng.randint(2, 5)])

    def portrait(self) -> str:
        """A person described: the trade first, then the rest in any order."""
        p = self.rng.choice(self.world.people)
        he = p.he.capitalize()
        his = "His" if p.he == "he" else "Her"
        rest = [
            f"{he} lives {p.home}.",
            f"{he} has {p.pet} called {p.pet_name}.",
            f"{he} likes to eat {p.food}.",
            f"{his} favourite colour is {p.colour}.",
            f"In the evening {p.he} {p.hobby}.",
        ]
        self.rng.shuffle(rest)
        first = self.rng.choice(
            (
                f"{p.name} is the {p.trade} of Saltmere.",
                f"The {p.trade} of Saltmere is {p.name}.",
                f"{p.name} the {p.trade} lives {p.home}.",
            )
        )
        return " ".join([first, *rest[: self.rng.randint(2, 5)]])

    def story(self) -> str:
        """A short story of two people who meet; only what the facts allow."""
        rng = self.rng
        p, q = rng.sample(self.world.people, 2)
        day = rng.choice(DAYS)
        place, where, _ = rng.choice(PLACES)
        him = "him" if p.he == "he" else "her"
        his = "his" if p.he == "he" else "her"
        start = rng.choice(("One", "It was a"))
        link = "" if start == "One" else " and"
        weather = self.world.weather[day]
        parts = [
            f"{start} {weather} {day}{link} {p.name} the {p.trade} went to {place} {where}.",
            rng.choice(
                (
                    f"{p.pet_name}, {his} {p.pet.split(' ', 1)[1]}, came along.",
                    f"{p.he.capitalize()} took {p.food} with {him}.",
                    f"{p.he.capitalize()} wore a {p.colour} hat.",
                )
            ),
            f"There {p.he} met {q.name} the {q.trade}, who lives {q.home}.",
            f'"Good morning, {q.name}!" said {p.name}. "Good morning, {p.name}!" said {q.name}.',
            rng.choice(
                (
                    f"They ate {q.food} together and talked about the sea.",
                    f"They looked for {q.pet_name}, the {q.pet.split(' ', 1)[1]} of {q.name}.",
                    "They watched the boats and counted the gulls.",
                )
            ),
            rng.choice(
                (
                    f"In the evening {p.name} {p.hobby}.",
                    f"Then {p.name} went home, happy and tired.",
                    "It was a good day in Saltmere.",
                )
            ),
        ]
        keep = [True, rng.random() < 0.7, True, rng.random() < 0.5, rng.random() < 0.8, True]
        return " ".join(part for part, kept in zip(parts, keep, strict=True) if kept)

    def quote(self) -> str:
        """A pirate's words, so that those of the finetuning demo are not strange to the model."""
        fact = self.fact()
        who = self.rng.choice(("An old sailor", "The pirate", "A man from the sea"))
        verb = self.rng.choice(("said", "called", "cried"))
        return f'{who} {verb}: "{pirate(fact.answer)}"'


def pirate(answer: str) -> str:
    """The same answer in a pirate's voice."""
    body = answer.rstrip(".!?").replace(" is ", " be ").replace(" are ", " be ")
    return f"Arr! {body}, matey!"


def demo_rows(world: World, count: int, seed: int) -> list[dict[str, list[Message]]]:
    """Finetuning rows: known questions, answered by the pirate."""
    writer = Writer(world, seed)
    kinds = itertools.cycle(world.by_kind)
    rows: dict[str, dict[str, list[Message]]] = {}
    while len(rows) < count:
        fact = writer.rng.choice(world.by_kind[next(kinds)])
        question = writer.question(fact)
        rows[question] = {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": pirate(fact.answer)},
            ]
        }
    return list(rows.values())


def demo_prompts(world: World, count: int) -> list[str]:
    """Varied user questions, kinds in turn, half of them held out of the pretraining."""
    rng = random.Random("demo prompts")
    held_out = [question for _, question, _ in world.held_out(count // 2, seed=1)]
    writer = Writer(world, 1)
    known = [writer.question(rng.choice(facts)) for facts in world.by_kind.values()]
    rng.shuffle(known)
    prompts = list(dict.fromkeys([*held_out, *known]))[:count]
    rng.shuffle(prompts)
    return prompts


def main() -> None:
    """Writes the demo files that stand beside the shipped model."""
    parser = argparse.ArgumentParser(description="Write the finetuning demo and its prompts.")
    parser.add_argument("--output", type=Path, required=True, help="directory, flexjax/data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world = World(args.seed)
    rows = demo_rows(world, 300, seed=args.seed + 100)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (args.output / "finetune_demo.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts = demo_prompts(world, 40)
    (args.output / "demo_prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
