"""The tasks: each function draws one question with its answer and the steps that lead to it.

A task returns a Turn. Its `key` says what is asked apart from the dress; `is_held_out` sends a fixed share of all keys
to the evaluation file, so that no prompt of that file can be drawn for training.
"""

import json
import zlib
from dataclasses import dataclass, field
from random import Random

import facts


@dataclass
class Turn:
    """One question. `calls` holds (tool name, arguments, result) made before the answer."""

    domain: str
    key: str
    question: str
    answer: str
    steps: str
    calls: list = field(default_factory=list)
    tools: list | None = None


def is_held_out(turn: Turn) -> bool:
    if turn.key in ("sum 37 48", "count strawberry"):
        return True
    if turn.key.startswith("chat "):  # greetings: "Hi" cannot be answered from "Hello"
        return False
    share = 6 if turn.domain.startswith("facts") else 12
    return zlib.crc32(turn.key.encode()) % share == 0


# ---- arithmetic

SUM = [
    "What is {}?",
    "What is {}?",
    "{} = ?",
    "Calculate {}.",
    "How much is {}?",
    "{}",
    "Can you work out {}?",
    "{} 等于多少？",
]


def _number(rng: Random) -> int:
    return rng.randrange(100) if rng.random() < 0.8 else rng.randrange(20)


def addition(rng: Random) -> Turn:
    a, b = _number(rng), _number(rng)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    low, high = sorted((a, b))
    question = rng.choice([*SUM, "What is the sum of {0} and {1}?", "Add {0} and {1}.", "What is {0} plus {1}?"])
    question = question.format(a, b) if "{0}" in question else question.format(f"{a} + {b}")
    steps = f"{a // 10 * 10} + {b // 10 * 10} = {tens}, {a % 10} + {b % 10} = {ones}, {tens} + {ones} = {a + b}"
    return Turn("arithmetic", f"sum {low} {high}", question, str(a + b), steps)


def subtraction(rng: Random) -> Turn:
    b, a = sorted((_number(rng), _number(rng)))
    question = rng.choice([*SUM, "Subtract {1} from {0}.", "What is {0} minus {1}?"])
    question = question.format(a, b) if "{0}" in question else question.format(f"{a} - {b}")
    middle = a - b // 10 * 10
    steps = f"{a} - {b // 10 * 10} = {middle}, {middle} - {b % 10} = {a - b}"
    return Turn("arithmetic", f"difference {a} {b}", question, str(a - b), steps)


def product(rng: Random) -> Turn:
    wordings = [*SUM, "What is {0} times {1}?", "Multiply {0} by {1}."]
    a, b = rng.randrange(13), rng.randrange(13)
    number = rng.randrange(len(wordings))
    question = wordings[number]
    question = question.format(a, b) if "{0}" in question else question.format(f"{a} * {b}")
    return Turn("arithmetic", f"product {a} {b} {number}", question, str(a * b), f"{a} * {b} = {a * b}")


def long_product(rng: Random) -> Turn:
    """Two digits by one; asked only with thinking on."""
    a, b = rng.randrange(13, 100), rng.randrange(2, 10)
    question = rng.choice(SUM).format(f"{a} * {b}")
    tens, ones = a // 10 * 10, a % 10
    steps = f"{tens} * {b} = {tens * b}, {ones} * {b} = {ones * b}, {tens * b} + {ones * b} = {a * b}"
    return Turn("arithmetic", f"product {a} {b}", question, str(a * b), steps)


# ---- sorting

ASCENDING = ["Sort {}.", "Sort these numbers: {}", "Put {} in ascending order.", "Order {} from small to large."]
DESCENDING = [
    "Sort {} in descending order.",
    "Sort these numbers from large to small: {}",
    "Order {} from large to small.",
]


def sorting(rng: Random) -> Turn:
    numbers = rng.sample(range(100), rng.choice([3, 3, 3, 4]))
    down = rng.random() < 0.4
    question = rng.choice(DESCENDING if down else ASCENDING).format(", ".join(map(str, numbers)))
    ordered = sorted(numbers, reverse=down)
    left, lines = list(numbers), []
    for n in ordered[:-1]:
        lines.append(f"{' '.join(map(str, left))}: {n}")
        left.remove(n)
    key = "sort " + " ".join(map(str, sorted(numbers)))
    return Turn("sorting", key, question, ", ".join(map(str, ordered)), "\n".join(lines))


# ---- letters

COUNT = [
    "How many times does the letter {0} occur in {1}?", "How many {0}'s are in {1}?",
    "How many letters {0} are in the word {1}?", "Count the letter {0} in {1}.", 'How many {0} are in "{1}"?',
]  # fmt: skip
LENGTH = ["How many letters are in {1}?", "How many letters does {1} have?", "How long is the word {1}?"]
ONSETS = [*"bcdfghjklmnprstvwz", "st", "tr", "br", "pl", "ch", "sh", "th"]
VOWELS = [*"aeiou", "ee", "oo", "ai", "y"]


def _word(rng: Random) -> str:
    """Returns a known word, or one made of syllables."""
    if rng.random() < 0.55:
        return rng.choice(facts.WORDS)
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(["", "", "n", "l", "r", "s", "t", "ll"])
                 for _ in range(rng.randint(1, 3)))  # fmt: skip
    return "".join(syllables)[:10]


def counting(rng: Random) -> Turn:
    word = _word(rng)
    if rng.random() < 0.2:
        steps = " ".join(f"{c}{i}" for i, c in enumerate(word, 1))
        return Turn("counting", f"count {word}", rng.choice(LENGTH).format("", word), str(len(word)), steps)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    steps = " ".join(f"{c}{word[: i + 1].count(letter)}" for i, c in enumerate(word))
    return Turn("counting", f"count {word}", rng.choice(COUNT).format(letter, word), str(word.count(letter)), steps)


# ---- facts

ARTICLE = dict.fromkeys("aeiou", "an")
CAPITAL = [
    "What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.", "Capital of {}?",
    "Tell me the capital of {}.", "What is the capital city of {}?", "Do you know the capital of {}?",
]  # fmt: skip
COUNTRY = [
    "{} is the capital of which country?",
    "Which country has the capital {}?",
    "Of which country is {} the capital?",
]
CAPITAL_ZH = [
    "{}的首都是哪里？",
    "{}的首都是什么？",
    "{}首都是哪座城市？",
    "请告诉我{}的首都。",
    "你知道{}的首都吗？",
    "{}的首都是哪座城市？",
]
COUNTRY_ZH = ["{}是哪个国家的首都？", "哪个国家的首都是{}？", "请问{}是哪国的首都？"]


def _fact(rng: Random, domain: str, wordings: list, thing: str, answer: str, steps: str) -> Turn:
    number = rng.randrange(len(wordings))
    question = wordings[number].format(thing, ARTICLE.get(thing[0], "a"))
    return Turn(domain, question, question, answer, steps)


def fact_en(rng: Random) -> Turn:
    kind = rng.choices(range(8), [8, 5, 4, 2, 2, 2, 2, 2])[0]
    if kind == 0:
        country, city, *_ = rng.choice(facts.CAPITALS)
        return _fact(rng, "facts_en", CAPITAL, country, city, f"{country}: capital {city}.")
    if kind == 1:
        country, city, *_ = rng.choice(facts.CAPITALS)
        return _fact(rng, "facts_en", COUNTRY, city, country, f"{city}: capital of {country}.")
    if kind == 2:
        pair = rng.sample(rng.choice(facts.OPPOSITES), 2)
        wordings = ["What is the opposite of {}?", "Name the opposite of {}.", "Opposite of {}?",
                    "Which word is the opposite of {}?", "Tell me the opposite of {}."]  # fmt: skip
        return _fact(rng, "facts_en", wordings, *pair, f"{pair[0]}, not {pair[0]}: {pair[1]}.")
    if kind == 3:
        names = rng.choice([facts.DAYS, facts.MONTHS])
        i, word = rng.randrange(len(names)), "day" if names is facts.DAYS else "month"
        after = names[(i + 1) % len(names)]
        wordings = [f"Which {word} comes after {{}}?", f"What {word} follows {{}}?", f"Name the {word} after {{}}."]
        return _fact(rng, "facts_en", wordings, names[i], after, f"{names[i]}, then {after}.")
    if kind == 4:
        names = rng.choice([facts.DAYS, facts.MONTHS])
        i, word = rng.randrange(len(names)), "day" if names is facts.DAYS else "month"
        before = names[i - 1]
        wordings = [f"Which {word} comes before {{}}?", f"What {word} is before {{}}?", f"Name the {word} before {{}}."]
        return _fact(rng, "facts_en", wordings, names[i], before, f"{before}, then {names[i]}.")
    if kind == 5:
        animal, young = rng.choice(facts.YOUNG)
        wordings = ["What is a young {} called?", "What do you call a baby {}?", "What is the young of {1} {0} called?",
                    "Name the young of {1} {0}."]  # fmt: skip
        return _fact(rng, "facts_en", wordings, animal, young, f"{animal}: the young is a {young}.")
    if kind == 6:
        element, symbol, _ = rng.choice(facts.SYMBOLS)
        wordings = ["What is the chemical symbol of {}?", "What is the symbol for {}?",
                    "Give the chemical symbol of {}.", "Which chemical symbol does {} have?"]  # fmt: skip
        return _fact(rng, "facts_en", wordings, element, symbol, f"{element}: symbol {symbol}.")
    wordings, answer = rng.choice(facts.SINGLES)
    return Turn("facts_en", f"chat {answer}", rng.choice(wordings), answer, "A simple question.")


def fact_zh(rng: Random) -> Turn:
    kind = rng.choices(range(6), [8, 5, 4, 2, 2, 2])[0]
    if kind == 0:
        *_, country, city = rng.choice(facts.CAPITALS)
        return _fact(rng, "facts_zh", CAPITAL_ZH, country, city, f"{country}：首都{city}。")
    if kind == 1:
        *_, country, city = rng.choice(facts.CAPITALS)
        return _fact(rng, "facts_zh", COUNTRY_ZH, city, country, f"{city}：{country}的首都。")
    if kind == 2:
        pair = rng.sample(rng.choice(facts.OPPOSITES_ZH), 2)
        wordings = ["“{}”的反义词是什么？", "{}的反义词是什么？", "请说出“{}”的反义词。", "“{}”的反义词是哪个字？"]
        return _fact(rng, "facts_zh", wordings, *pair, f"不{pair[0]}：{pair[1]}。")
    if kind == 3:
        i = rng.randrange(7)
        after = facts.DAYS_ZH[(i + 1) % 7]
        wordings = ["{}的后一天是星期几？", "{}后面是星期几？", "请问{}之后是星期几？"]
        return _fact(rng, "facts_zh", wordings, facts.DAYS_ZH[i], after, f"{facts.DAYS_ZH[i]}，{after}。")
    if kind == 4:
        _, symbol, element = rng.choice(facts.SYMBOLS)
        wordings = ["{}的化学符号是什么？", "{}的元素符号是什么？", "请写出{}的化学符号。"]
        return _fact(rng, "facts_zh", wordings, element, symbol, f"{element}：符号{symbol}。")
    wordings, answer = rng.choice(facts.SINGLES_ZH)
    return Turn("facts_zh", f"chat {answer}", rng.choice(wordings), answer, "这是一个简单的问题。")


# ---- units

UNITS = [  # from, to, factor, largest count
    ("kilometres", "metres", 1000, 99), ("metres", "centimetres", 100, 99), ("centimetres", "millimetres", 10, 99),
    ("kilograms", "grams", 1000, 99), ("litres", "millilitres", 1000, 99), ("tons", "kilograms", 1000, 99),
    ("hours", "minutes", 60, 12), ("minutes", "seconds", 60, 12), ("weeks", "days", 7, 12), ("days", "hours", 24, 7),
    ("dozens", "pieces", 12, 12), ("years", "months", 12, 12), ("feet", "inches", 12, 12), ("yards", "feet", 3, 20),
]  # fmt: skip
CONVERT = ["How many {to} are {n} {of}?", "Convert {n} {of} to {to}.", "{n} {of} in {to}?",
           "How many {to} are in {n} {of}?", "What is {n} {of} in {to}?",
           "Please convert {n} {of} into {to}."]  # fmt: skip


def units(rng: Random) -> Turn:
    number = rng.randrange(len(CONVERT))
    if rng.random() < 0.12:
        n = rng.randrange(0, 101, 5)
        answer, of, to = n * 9 // 5 + 32, "degrees Celsius", "degrees Fahrenheit"
        number = number if number not in (0, 3) else 1
        question = CONVERT[number].format(n=n, of=of, to=to)
        steps = f"{n} / 5 * 9 = {n * 9 // 5}, {n * 9 // 5} + 32 = {answer}"
        return Turn("units", question, question, f"{answer} {to}", steps)
    large, small, factor, most = rng.choices(UNITS, [2] * 6 + [1] * 8)[0]
    n = rng.randint(2, most)
    back = rng.random() < 0.35
    of, to, given, answer = (small, large, n * factor, n) if back else (large, small, n, n * factor)
    question = CONVERT[number].format(n=given, of=of, to=to)
    steps = f"{given} {'/' if back else '*'} {factor} = {answer}"
    # Units in powers of ten follow a rule; the others are small tables, held out by wording.
    key = f"{given} {of} {to}" if factor % 10 == 0 and factor != 60 else question
    return Turn("units", key, question, f"{answer} {to}", steps)


# ---- tools


def _tool(name: str, description: str, parameter: str, what: str) -> dict:
    schema = {
        "type": "object",
        "properties": {parameter: {"type": "string", "description": what}},
        "required": [parameter],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = {
    "weather": [_tool("get_weather", "Current weather in a city", "city", "Name of the city"),
                _tool("weather", "The weather now", "place", "City")],
    "time": [_tool("get_time", "Current time in a city", "city", "Name of the city"),
             _tool("clock", "The time in a place", "place", "City")],
    "calculator": [_tool("calculator", "Evaluate an expression", "expression", "What to calculate"),
                   _tool("calculate", "Exact arithmetic", "expression", "Expression")],
    "lookup": [_tool("lookup", "Look up the state of an order", "order", "Number of the order"),
               _tool("order_status", "State of an order", "id", "Number")],
}  # fmt: skip
ASK_WEATHER = ["What is the weather in {}?", "How is the weather in {}?", "Weather in {}?",
               "What is the weather like in {}?", "Tell me the weather in {}."]  # fmt: skip
ASK_TIME = ["What time is it in {}?", "Tell me the time in {}.", "What is the time in {}?", "Time in {}?"]
ASK_ORDER = ["Where is order {}?", "What is the state of order {}?", "Look up order {}.", "Check order {}, please."]


def toolbox(rng: Random, first: str | None = None) -> list:
    """Two to four tools in any order, `first` among them, each under one of its names."""
    kinds = [k for k in TOOLS if k != first]
    kinds = rng.sample(kinds, rng.randint(1, 3)) + ([first] if first else [])
    rng.shuffle(kinds)
    return [rng.choice(TOOLS[k]) for k in kinds]


def tool_use(rng: Random) -> Turn:
    kind = rng.choice(list(TOOLS))
    tools = toolbox(rng, kind)
    tool = next(t for t in tools if t in TOOLS[kind])["function"]
    (parameter,) = tool["parameters"]["properties"]
    if kind == "weather":
        value = rng.choice(facts.CITIES)
        degrees, sky = rng.randint(1, 35), rng.choice(facts.SKIES)
        result = json.dumps({"temperature": degrees, "sky": sky})
        question, answer = rng.choice(ASK_WEATHER).format(value), f"{degrees} degrees and {sky} in {value}."
    elif kind == "time":
        value = rng.choice(facts.CITIES)
        result = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
        question, answer = rng.choice(ASK_TIME).format(value), f"It is {result} in {value}."
    elif kind == "calculator":
        a, b, sign = rng.randint(100, 9999), rng.randint(100, 9999), rng.choice("+-*")
        value = f"{a} {sign} {b}"
        result = str({"+": a + b, "-": a - b, "*": a * b}[sign])
        question, answer = rng.choice(SUM).format(value), result
    else:
        value = str(rng.randint(1000, 9999))
        result = rng.choice(facts.STATES)
        question, answer = rng.choice(ASK_ORDER).format(value), f"Order {value} is {result}."
    key = f"{kind} {question}"
    steps = f"Use {tool['name']} for {value}."
    return Turn("tools", key, question, answer, steps, [(tool["name"], {parameter: value}, result)], tools)


DOMAINS = {
    "arithmetic": lambda rng, think: rng.choice(
        [addition, addition, subtraction, subtraction, product] + [long_product] * think
    )(rng),
    "sorting": lambda rng, think: sorting(rng),
    "counting": lambda rng, think: counting(rng),
    "facts_en": lambda rng, think: fact_en(rng),
    "facts_zh": lambda rng, think: fact_zh(rng),
    "units": lambda rng, think: units(rng),
    "tools": lambda rng, think: tool_use(rng),
}
# By mode: sums are hard without thinking, lists and letters with it, since there is more to write down.
SHARES = {
    False: {"arithmetic": 14, "sorting": 7, "counting": 7, "facts_en": 3, "facts_zh": 2, "units": 3, "tools": 1.2},
    True: {"arithmetic": 5, "sorting": 8, "counting": 10, "facts_en": 3, "facts_zh": 2, "units": 3, "tools": 1.2},
}


def draw(rng: Random, think: bool, domain: str | None = None, held_out: bool = False) -> Turn:
    """Returns a turn for training, or one for the evaluation file."""
    while True:
        name = domain or rng.choices(list(SHARES[think]), list(SHARES[think].values()))[0]
        turn = DOMAINS[name](rng, think)
        if is_held_out(turn) == held_out:
            return turn
