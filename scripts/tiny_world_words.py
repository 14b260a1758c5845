"""Words and sentence patterns of the small world; data only, see tiny_world.py."""

PEOPLE = tuple(
    (name, "she" if i % 2 == 0 else "he")
    for i, name in enumerate(
        "Tilda Orrin Maren Bram Ida Jonas Petra Silas Wren Hugo Nell Caspar Linnea Tobias Greta "
        "Felix Rosa Anton Hedda Emil".split()
    )
)
UNKNOWN_NAMES = tuple(
    "Zoltan Quentin Xavier Barbara Kevin Monica Ursula Victor Yolanda Gordon Norbert Camilla "
    "Dexter Agatha Leopold Samantha".split()
)
TRADES = (
    *"baker fisher miller smith sailor teacher doctor weaver carpenter gardener painter".split(),
    *"cook potter tailor shepherd librarian beekeeper innkeeper boatbuilder clockmaker".split(),
)
STREETS = (
    "in Herring Lane",
    "in Mill Street",
    "in Anchor Square",
    "on Gull Hill",
    "in Rope Walk",
    "in Garden Row",
)
PETS = (
    *("a cat", "a dog", "a goat", "a parrot", "a rabbit", "a pony", "a hen", "a tortoise"),
    *("an owl", "a duck"),
)
PET_NAMES = tuple(
    "Pip Socks Button Juno Moss Biscuit Duke Pearl Fern Rusty Snowball Pepper Bella Otto Clover "
    "Max Daisy Finn Poppy Toby".split()
)
FOODS = (
    *("plum cake", "fish soup", "rye bread", "apple pie", "fried eggs", "goat cheese"),
    *("pea soup", "honey buns", "baked potatoes", "roast chicken", "oat porridge", "berry jam"),
)
COLOURS = tuple("red blue green yellow white black purple orange".split())
HOBBIES = (
    *("plays the fiddle", "plays the flute", "sings old songs", "reads long books"),
    *("paints small pictures", "plays chess", "walks by the sea", "counts the stars"),
    *("knits warm socks", "carves wooden birds"),
)
PLACES = (
    ("the harbour", "below the town wall", "watch the boats"),
    ("the market", "in Anchor Square", "buy fresh food"),
    ("the lighthouse", "on the north cliff", "see far over the sea"),
    ("the mill", "beside the river", "buy flour"),
    ("the school", "behind the church", "learn to read"),
    ("the inn", "next to the harbour", "eat and sleep"),
    ("the library", "in Garden Row", "borrow books"),
    ("the bakery", "in Herring Lane", "buy warm bread"),
    ("the smithy", "near the bridge", "buy nails and knives"),
    ("the garden", "behind the mill", "pick flowers"),
    ("the church", "on Gull Hill", "hear the bells"),
    ("the clock tower", "in Mill Street", "see what time it is"),
)
ANIMALS = (
    ("a cat", "meow", "fish", "in the house"),
    ("a dog", "woof", "meat", "in the yard"),
    ("a cow", "moo", "grass", "in the meadow"),
    ("a horse", "neigh", "hay", "in the stable"),
    ("a sheep", "baa", "clover", "on the hill"),
    ("a duck", "quack", "water plants", "on the river"),
    ("a gull", "kree", "crabs", "on the cliff"),
    ("a bee", "buzz", "nectar", "in the hive"),
    ("a frog", "croak", "flies", "in the pond"),
    ("an owl", "hoot", "mice", "in the old tower"),
    ("a hen", "cluck", "corn", "in the hen house"),
    ("a goat", "meh", "leaves", "behind the mill"),
)
THINGS = (
    *(("the sea", "blue"), ("the sky", "blue"), ("grass", "green"), ("snow", "white")),
    *(("coal", "black"), ("the sun", "yellow"), ("a lemon", "yellow"), ("a plum", "purple")),
    *(("a carrot", "orange"), ("salt", "white"), ("a tomato", "red"), ("milk", "white")),
    *(("the night", "black"), ("a leaf", "green"), ("a strawberry", "red")),
    *(("a pumpkin", "orange"), ("the lighthouse", "red"), ("the town wall", "white")),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = ("sunny", "rainy", "windy", "foggy", "cloudy", "stormy", "snowy")
GOODS = ("fresh fish", "apples", "cheese", "wool", "clay pots", "honey", "flowers")
BOATS = (
    *("the Sea Rose", "the Grey Goose", "the Morning Star", "the Silver Eel"),
    *("the Old Friend", "the Little Whale", "the North Wind", "the Lucky Penny"),
)
CARGO = ("salt", "timber", "wool", "grain", "barrels", "fish", "coal", "rope")
OPENERS = (
    *("Please tell me: ", "Tell me: ", "Excuse me. ", "Hello! ", "Good morning! "),
    *("I have a question. ", "Can you help me? ", "Quick question: "),
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly guide to Saltmere.",
    "Answer politely and briefly.",
    "You are a polite assistant who knows the town of Saltmere.",
)
PIRATE_SYSTEMS = ("Talk like a pirate.", "You are a pirate.", "Answer in the voice of a pirate.")

SOCIAL = (
    (
        (
            "Hello!",
            "Hello",
            "Hi!",
            "Hi there!",
            "Hey!",
            "Good morning!",
            "Good day!",
            "Hello there!",
        ),
        "Hello! How can I help you?",
    ),
    (
        (
            "Thank you!",
            "Thanks!",
            "Thank you very much.",
            "Many thanks!",
            "Thank you for the help.",
        ),
        "You are welcome!",
    ),
    (
        ("Goodbye!", "Bye!", "See you later!", "Good night!", "I have to go now."),
        "Goodbye! Come back soon.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am a tiny assistant from Saltmere.",
    ),
    (
        ("How are you?", "How do you do?", "Are you well?", "How do you feel today?"),
        "I am very well, thank you.",
    ),
    (
        ("What is Saltmere?", "Tell me about Saltmere.", "Where are we?", "What is this town?"),
        "Saltmere is a small harbour town by the sea.",
    ),
    (
        ("What can you do?", "What do you know?", "Can you help me?", "What can I ask you?"),
        "I can tell you about the people, animals and places of Saltmere.",
    ),
    (
        ("How many people live in Saltmere?", "How big is Saltmere?", "Is Saltmere a big town?"),
        "Twenty people live in Saltmere.",
    ),
    (
        ("How many boats are in the harbour?", "How many boats are there?", "Count the boats."),
        "There are eight boats in the harbour.",
    ),
    (
        ("What is the capital of France?", "Who is the president?", "What is a computer?")
        + ("Write a poem.", "What is quantum physics?", "Who won the game?", "What is the news?")
        + ("How far is the moon?", "What is love?", "Which phone should I buy?"),
        "I am sorry, I only know about Saltmere.",
    ),
)
