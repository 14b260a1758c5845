"""Questions, answers and statements of each kind of fact; data only, see tiny_world.py."""

Template = tuple[tuple[str, ...], str, tuple[str, ...]]
"""Questions, the answer, statements."""

TEMPLATES: dict[str, Template] = {
    "trade": (
        (
            "What does {name} do?",
            "What is the trade of {name}?",
            "What work does {name} do?",
            "What is {name}?",
            "What is the job of {name}?",
            "What does {name} do for a living?",
            "Do you know what {name} does?",
            "Which trade does {name} have?",
            "Who is {name}?",
            "Can you tell me who {name} is?",
        ),
        "{name} is the {trade} of Saltmere.",
        ("{name} is the {trade} of Saltmere.", "{name} works as the {trade}."),
    ),
    "who": (
        (
            "Who is the {trade}?",
            "Who is the {trade} of Saltmere?",
            "What is the name of the {trade}?",
            "Who works as the {trade}?",
            "Do you know the {trade}?",
            "What is the {trade} called?",
            "Can you tell me who the {trade} is?",
            "Which person is the {trade}?",
            "I am looking for the {trade}. Who is it?",
        ),
        "The {trade} of Saltmere is {name}.",
        ("The {trade} of Saltmere is {name}.", "The {trade} is called {name}."),
    ),
    "home": (
        (
            "Where does {name} live?",
            "Where is the house of {name}?",
            "In which street does {name} live?",
            "Where can I find {name}?",
            "Do you know where {name} lives?",
            "Where is {name} at home?",
            "Can you tell me where {name} lives?",
            "I want to visit {name}. Where should I go?",
        ),
        "{name} lives {home}.",
        ("{name} lives {home}.", "The house of {name} stands {home}."),
    ),
    "pet": (
        (
            "Which animal does {name} have?",
            "What pet does {name} have?",
            "What kind of animal does {name} keep?",
            "Does {name} have a pet?",
            "Which pet lives with {name}?",
            "What is the pet of {name}?",
            "Do you know which animal {name} has?",
            "Tell me about the pet of {name}.",
            "What is the animal of {name} called?",
        ),
        "{name} has {pet} called {pet_name}.",
        ("{name} has {pet} called {pet_name}.", "{pet_name} lives with {name}."),
    ),
    "pet_owner": (
        (
            "Who is {pet_name}?",
            "Whose animal is {pet_name}?",
            "Who has a pet called {pet_name}?",
            "To whom does {pet_name} belong?",
            "Who is the owner of {pet_name}?",
            "Do you know {pet_name}?",
            "Tell me about {pet_name}.",
            "What kind of animal is {pet_name}?",
        ),
        "{pet_name} is {pet} and belongs to {name}.",
        ("{pet_name} is {pet} and belongs to {name}.",),
    ),
    "food": (
        (
            "What does {name} like to eat?",
            "What is the favourite food of {name}?",
            "Which food does {name} like best?",
            "What should I cook for {name}?",
            "Do you know what {name} likes to eat?",
            "What does {name} eat most gladly?",
            "{name} is hungry. What should I bring?",
            "Which meal does {name} love?",
        ),
        "{name} likes to eat {food}.",
        ("{name} likes to eat {food}.", "The favourite food of {name} is {food}."),
    ),
    "colour": (
        (
            "What is the favourite colour of {name}?",
            "Which colour does {name} like?",
            "What colour does {name} like best?",
            "Which colour does {name} love?",
            "Do you know the favourite colour of {name}?",
            "I want to buy a scarf for {name}. Which colour?",
            "What colour is the hat of {name}?",
            "Which colour does {name} wear?",
        ),
        "{name} likes the colour {colour}.",
        ("{name} likes the colour {colour}.", "The hat of {name} is {colour}."),
    ),
    "hobby": (
        (
            "What does {name} do in the evening?",
            "What is the hobby of {name}?",
            "How does {name} spend the evening?",
            "What does {name} like to do after work?",
            "What does {name} do for fun?",
            "Do you know the hobby of {name}?",
            "What does {name} do at night?",
            "What does {name} do when the work is done?",
        ),
        "In the evening {name} {hobby}.",
        ("In the evening {name} {hobby}.", "After work {name} {hobby}."),
    ),
    "yes_trade": (
        (
            "Is {name} the {trade}?",
            "Is {name} the {trade} of Saltmere?",
            "Does {name} work as the {trade}?",
            "Is it true that {name} is the {trade}?",
        ),
        "Yes, {name} is the {trade}.",
        (),
    ),
    "no_trade": (
        (
            "Is {name} the {other}?",
            "Is {name} the {other} of Saltmere?",
            "Does {name} work as the {other}?",
            "Is it true that {name} is the {other}?",
        ),
        "No, {name} is the {trade}.",
        (),
    ),
    "yes_pet": (
        (
            "Does {name} have {pet}?",
            "Is it true that {name} has {pet}?",
            "Does {name} keep {pet}?",
        ),
        "Yes, {name} has {pet} called {pet_name}.",
        (),
    ),
    "no_pet": (
        (
            "Does {name} have {other}?",
            "Is it true that {name} has {other}?",
            "Does {name} keep {other}?",
        ),
        "No, {name} has {pet} called {pet_name}.",
        (),
    ),
    "unknown": (
        (
            "Who is {name}?",
            "What does {name} do?",
            "Where does {name} live?",
            "What does {name} like to eat?",
            "Which animal does {name} have?",
            "What is the favourite colour of {name}?",
            "Do you know {name}?",
            "Tell me about {name}.",
        ),
        "I am sorry, I do not know that person.",
        (),
    ),
    "place_where": (
        (
            "Where is {place}?",
            "Where can I find {place}?",
            "How do I get to {place}?",
            "Do you know where {place} is?",
            "Can you tell me where {place} is?",
            "I am looking for {place}.",
            "In which part of the town is {place}?",
        ),
        "{place} is {where}.",
        ("{place} is {where}.", "You find {place} {where}."),
    ),
    "place_use": (
        (
            "What can I do at {place}?",
            "What is {place} good for?",
            "Why do people go to {place}?",
            "What do people do at {place}?",
            "Why should I visit {place}?",
            "Tell me about {place}.",
        ),
        "At {place} you can {activity}.",
        ("At {place} you can {activity}.", "People go to {place} to {activity}."),
    ),
    "sound": (
        (
            "What does {animal} say?",
            "Which sound does {animal} make?",
            "What sound does {animal} make?",
            "How does {animal} sound?",
            "Do you know what {animal} says?",
        ),
        "{animal} says {sound}.",
        ("{animal} says {sound}.",),
    ),
    "meal": (
        (
            "What does {animal} eat?",
            "What do I feed {animal}?",
            "What is the food of {animal}?",
            "What does {animal} like to eat?",
            "Do you know what {animal} eats?",
        ),
        "{animal} eats {meal}.",
        ("{animal} eats {meal}.",),
    ),
    "den": (
        (
            "Where does {animal} live?",
            "Where is the home of {animal}?",
            "Where does {animal} sleep?",
            "Where can I find {animal}?",
            "Do you know where {animal} lives?",
        ),
        "{animal} lives {den}.",
        ("{animal} lives {den}.",),
    ),
    "thing": (
        (
            "What colour is {thing}?",
            "Which colour is {thing}?",
            "What is the colour of {thing}?",
            "Do you know the colour of {thing}?",
            "Which colour does {thing} have?",
            "Can you tell me what colour {thing} is?",
        ),
        "{thing} is {colour}.",
        ("{thing} is {colour}.",),
    ),
    "weather": (
        (
            "What is the weather on {day}?",
            "How is the weather on {day}?",
            "What will the weather be on {day}?",
            "What weather do we have on {day}?",
            "Do I need a coat on {day}?",
            "Is it sunny on {day}?",
            "Does it rain on {day}?",
        ),
        "On {day} it is {weather} in Saltmere.",
        ("On {day} it is {weather} in Saltmere.", "Every {day} is {weather} here."),
    ),
    "market": (
        (
            "What is sold on {day}?",
            "What can I buy at the market on {day}?",
            "What does the market sell on {day}?",
            "What is on sale on {day}?",
            "What do they sell at the market on {day}?",
            "It is {day}. What can I buy?",
        ),
        "On {day} the market sells {goods}.",
        ("On {day} the market sells {goods}.",),
    ),
    "day_after": (
        (
            "Which day comes after {day}?",
            "What day is it after {day}?",
            "Today is {day}. What is tomorrow?",
            "If today is {day}, what day is tomorrow?",
            "Which day follows {day}?",
        ),
        "After {day} comes {other}.",
        ("After {day} comes {other}.",),
    ),
    "day_before": (
        (
            "Which day comes before {day}?",
            "What day is it before {day}?",
            "Today is {day}. What was yesterday?",
            "If today is {day}, what day was yesterday?",
        ),
        "Before {day} comes {other}.",
        ("Before {day} comes {other}.",),
    ),
    "boat_owner": (
        (
            "Who owns {boat}?",
            "To whom does {boat} belong?",
            "Whose boat is {boat}?",
            "Who sails {boat}?",
            "Who is the owner of {boat}?",
            "Do you know who owns {boat}?",
        ),
        "{boat} belongs to {owner}.",
        ("{boat} belongs to {owner}.", "{owner} sails {boat}."),
    ),
    "boat_colour": (
        (
            "What colour is {boat}?",
            "Which colour is {boat}?",
            "What is the colour of {boat}?",
            "Which colour does {boat} have?",
            "Do you know the colour of {boat}?",
        ),
        "{boat} is painted {colour}.",
        ("{boat} is painted {colour}.",),
    ),
    "boat_load": (
        (
            "What does {boat} carry?",
            "What is the load of {boat}?",
            "What is on board of {boat}?",
            "What does {boat} bring to the harbour?",
            "Do you know what {boat} carries?",
        ),
        "{boat} carries {load}.",
        ("{boat} carries {load}.",),
    ),
    "plus": (
        (
            "What is {a} plus {b}?",
            "How much is {a} plus {b}?",
            "What is the sum of {a} and {b}?",
            "Add {a} and {b}.",
            "What is {a} + {b}?",
            "Can you add {a} and {b}?",
            "I have {a} apples and get {b} more. How many are there?",
        ),
        "{a} plus {b} is {c}.",
        ("{a} plus {b} is {c}.",),
    ),
    "minus": (
        (
            "What is {a} minus {b}?",
            "How much is {a} minus {b}?",
            "What is {a} - {b}?",
            "Take {b} from {a}.",
            "What is left when I take {b} from {a}?",
            "I have {a} apples and eat {b}. How many are left?",
        ),
        "{a} minus {b} is {c}.",
        ("{a} minus {b} is {c}.",),
    ),
    "after": (
        (
            "Which number comes after {a}?",
            "What number follows {a}?",
            "What comes after {a}?",
            "I count to {a}. What is next?",
        ),
        "After {a} comes {c}.",
        ("After {a} comes {c}.",),
    ),
    "before": (
        (
            "Which number comes before {a}?",
            "What number is before {a}?",
            "What comes before {a}?",
        ),
        "Before {a} comes {c}.",
        ("Before {a} comes {c}.",),
    ),
}


def _by_trade(template: Template) -> Template:
    """The same sentences about "the baker" in place of a name."""
    questions, answer, statements = template

    def swap(text: str) -> str:
        return text.replace("{name}", "the {trade}")

    return tuple(map(swap, questions)), swap(answer), tuple(map(swap, statements))


for _kind in ("home", "food", "colour", "pet"):
    TEMPLATES[f"trade_{_kind}"] = _by_trade(TEMPLATES[_kind])
