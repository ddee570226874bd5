"""The tools, names and facts of the templates in `assistant.py`. Data, and the little that fills it in."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]

NAMES = (
    "Mara Lindqvist",
    "Tomas Okafor",
    "Ines Calder",
    "Jonah Virtanen",
    "Priya Sandoval",
    "Lea Morrow",
    "Omar Keller",
)
TOWNS = ("Ostervik", "Bremhaven", "Callowmere", "Port Sellen", "Grunau", "Tavistow", "Lakeridge", "Monte Verde")
PRODUCTS = ("Halden lamp", "Corvus bicycle", "Pico kettle", "Marlin tent", "Aster desk", "Nimbus scale", "Tolva radio")
CITIES = ("Oslo", "Lima", "Kyoto", "Porto", "Nairobi", "Denver", "Leipzig", "Cork", "Turin", "Hanoi")
DATES = ("2026-03-04", "2026-05-17", "2026-08-09", "2026-10-30", "2027-01-12")
WORDS = ("garden", "window", "river", "bread", "castle", "winter", "candle", "mirror")
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF")
LANGUAGES = ("French", "Spanish", "German", "Italian")
FOODS = ("lentils", "salmon", "mushrooms", "rice", "spinach", "pears")

FACTS: tuple[tuple[str, str], ...] = (
    *(
        (f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        for country, city in (
            ("Norway", "Oslo"),
            ("Japan", "Tokyo"),
            ("Italy", "Rome"),
            ("Spain", "Madrid"),
            ("Egypt", "Cairo"),
            ("Peru", "Lima"),
            ("Austria", "Vienna"),
            ("Portugal", "Lisbon"),
            ("Kenya", "Nairobi"),
            ("Greece", "Athens"),
            ("Cuba", "Havana"),
            ("Finland", "Helsinki"),
        )
    ),
    *(
        (f"Who wrote {work}?", f"{work} was written by {author}.")
        for work, author in (
            ("Hamlet", "William Shakespeare"),
            ("Faust", "Johann Wolfgang von Goethe"),
            ("Don Quixote", "Miguel de Cervantes"),
            ("Emma", "Jane Austen"),
            ("War and Peace", "Leo Tolstoy"),
            ("The Odyssey", "Homer"),
        )
    ),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("What is the largest planet of the solar system?", "Jupiter is the largest planet of the solar system."),
    ("What is the chemical symbol of gold?", "The chemical symbol of gold is Au."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("Which ocean is the largest?", "The Pacific Ocean is the largest ocean."),
    ("What do bees make?", "Bees make honey."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Which gas do plants take from the air?", "Plants take carbon dioxide from the air."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("What colour do blue and yellow make?", "Blue and yellow make green."),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi, how are you?", "I am doing well, thank you. How can I help you?"),
    ("Thanks!", "You are welcome!"),
    ("Who are you?", "I am an assistant. I answer questions, read documents and use tools."),
)


@dataclass(frozen=True)
class ToolTemplate:
    """A tool, ways to ask for it, and what it answers. In texts, `{name}` is the value of a parameter."""

    name: str
    description: str
    parameters: Mapping[str, tuple[str, str, Sequence[Any]]]
    """Name -> (JSON type, description, values)."""
    asks: Sequence[str]
    result: Mapping[str, Any]
    """A text with `{name}` is filled in; a range is drawn from."""
    answer: str
    subject: Sequence[str]
    """The parameters that a second call in the same reply changes."""
    pair: str = ""
    """A question about two subjects: `{first}` and `{second}`."""
    vague: Sequence[str] = ()
    """Questions that lack the subject."""
    question: str = ""
    """The assistant's question in return."""
    optional: Sequence[str] = ()

    def define(self) -> dict[str, Any]:
        """Return the tool as OpenAI's clients send it."""
        properties = {name: {"type": kind, "description": about} for name, (kind, about, _) in self.parameters.items()}
        required = [name for name in self.parameters if name not in self.optional]
        schema = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}

    def draw_values(self, draw: random.Random) -> Values:
        """Return a value for each parameter; some optional ones are left out."""
        taken = [name for name in self.parameters if name not in self.optional or draw.random() < 0.5]
        return {name: draw.choice(list(self.parameters[name][2])) for name in taken}

    def ask(self, draw: random.Random, values: Values) -> str:
        """Return a question that has all the values."""
        fitting = [text for text in self.asks if {it for it in self.parameters if f"{{{it}}}" in text} == set(values)]
        return draw.choice(fitting).format(**values)

    def ask_twice(self, first: Values, second: Values) -> str:
        """Return a question about two subjects."""
        one, other = (", ".join(str(values[name]) for name in self.subject) for values in (first, second))
        return self.pair.format(**{**first, "first": one, "second": other})

    def arguments(self, values: Values) -> Values:
        """Return the values in the order of the definition."""
        return {name: values[name] for name in self.parameters if name in values}

    def respond(self, draw: random.Random, values: Values) -> tuple[str, str]:
        """Return the tool's result and the assistant's sentence about it."""
        made = {key: draw.choice(it) if isinstance(it, range | tuple) else it for key, it in self.result.items()}
        made = {key: it.format(**values) if isinstance(it, str) else it for key, it in made.items()}
        return json.dumps(made, ensure_ascii=False), self.answer.format(**{**values, **made})


TOOLS: tuple[ToolTemplate, ...] = (
    ToolTemplate(
        "get_weather",
        "Get the weather of a city.",
        {"city": ("string", "The city", CITIES)},
        ("What is the weather in {city}?", "Is it raining in {city}?", "How warm is it in {city} now?"),
        {"city": "{city}", "degrees": range(-5, 35), "sky": ("clear", "cloudy", "rainy")},
        "In {city} it is {sky} at {degrees} degrees.",
        ("city",),
        "Compare the weather in {first} and {second}.",
        ("What is the weather like?", "Will I need a coat?"),
        "For which city?",
    ),
    ToolTemplate(
        "convert_currency",
        "Convert an amount of money from one currency to another.",
        {
            "amount": ("number", "The amount", range(5, 900, 7)),
            "source": ("string", "Currency code of the amount", CURRENCIES[:3]),
            "target": ("string", "Currency code to convert to", CURRENCIES[3:]),
        },
        ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"),
        {"converted": range(10, 9000)},
        "{amount} {source} are {converted} {target}.",
        ("amount",),
        "How much are {first} and {second} {source} in {target}?",
    ),
    ToolTemplate(
        "create_event",
        "Add an event to the calendar.",
        {
            "title": ("string", "What the event is", ("dentist", "team lunch", "piano lesson", "car inspection")),
            "date": ("string", "The day, YYYY-MM-DD", DATES),
            "hour": ("integer", "The hour it begins, 0 to 23", range(8, 20)),
        },
        ("Put {title} in my calendar on {date}, hour {hour}.", "Schedule {title} for {date}, starting at hour {hour}."),
        {"created": True},
        "I added {title} to your calendar on {date} at {hour}:00.",
        ("title",),
        "Put {first} and {second} in my calendar on {date}, hour {hour}.",
    ),
    ToolTemplate(
        "find_recipes",
        "Find recipes that use an ingredient.",
        {
            "ingredient": ("string", "The ingredient", FOODS),
            "max_minutes": ("integer", "Longest time to cook, in minutes", range(10, 60, 5)),
        },
        (
            "What can I cook with {ingredient}?",
            "Find me recipes with {ingredient}.",
            "I have {ingredient} and {max_minutes} minutes. What can I cook?",
        ),
        {"recipe": "Baked {ingredient}", "minutes": range(10, 50)},
        "You could make {recipe}, which takes {minutes} minutes.",
        ("ingredient",),
        vague=("What should I cook tonight?", "Find me a recipe."),
        question="Which ingredient would you like to use?",
        optional=("max_minutes",),
    ),
    ToolTemplate(
        "translate",
        "Translate a text into another language.",
        {
            "text": ("string", "The text", WORDS),
            "language": ("string", "The language to translate into", LANGUAGES),
        },
        ("Translate '{text}' into {language}.", "What is '{text}' in {language}?"),
        {"translation": ("jardin", "fenster", "rio", "pane", "hiver", "espejo")},
        "In {language}, '{text}' is '{translation}'.",
        ("text",),
        "Translate '{first}' and '{second}' into {language}.",
    ),
    ToolTemplate(
        "get_stock_price",
        "Get the price of a share.",
        {"symbol": ("string", "The ticker symbol", ("ABCX", "QRLN", "TVMO", "HALD", "ZENQ"))},
        ("What is the price of {symbol}?", "How is {symbol} doing on the market?", "Price of {symbol} shares, please."),
        {"price": range(4, 800)},
        "{symbol} is at {price} dollars.",
        ("symbol",),
        "What do {first} and {second} cost?",
        ("What is the share price?",),
        "Which ticker symbol do you mean?",
    ),
    ToolTemplate(
        "send_message",
        "Send a message to a person.",
        {
            "recipient": ("string", "Who gets it", NAMES),
            "body": (
                "string",
                "The text of the message",
                ("I will be late", "The meeting is moved", "Dinner is ready"),
            ),
        },
        ("Tell {recipient}: {body}.", "Send {recipient} the message '{body}'."),
        {"sent": True},
        "I sent the message to {recipient}.",
        ("recipient",),
        "Tell {first} and {second}: {body}.",
    ),
    ToolTemplate(
        "calculate",
        "Compute the value of an arithmetic expression.",
        {
            "expression": (
                "string",
                "For example 3 * (4 + 5)",
                [f"{a} * {b}" for a in (12, 37, 48) for b in (19, 23, 71)],
            )
        },
        ("What is {expression}?", "Calculate {expression}.", "Please compute {expression} for me."),
        {"value": range(200, 4000)},
        "{expression} = {value}.",
        ("expression",),
        "What are {first} and {second}?",
    ),
    ToolTemplate(
        "run_python",
        "Run Python code and return what it prints.",
        {"code": ("string", "The code", [f"print({a} ** {b})" for a in (2, 3, 7, 11) for b in (5, 8, 12)])},
        ("Run this Python code: {code}", "Use Python to run {code}", "What does {code} print?"),
        {"output": range(32, 90_000)},
        "It printed {output}.",
        ("code",),
    ),
    ToolTemplate(
        "search_documents",
        "Find passages of the documents you were given to read.",
        {
            "query": (
                "string",
                "What to look for",
                [f"{product} {word}" for product in PRODUCTS for word in ("price", "size")],
            )
        },
        ("Search the documents for {query}.", "What do my documents say about {query}?", "Look up {query}."),
        {"passage": "{query}: see the catalogue of 2025.", "title": "catalogue"},
        "The documents say: {passage}",
        ("query",),
        "Search the documents for {first} and for {second}.",
    ),
    ToolTemplate(
        "track_parcel",
        "Get where a parcel is.",
        {"parcel": ("string", "The parcel's number", [f"PK{number}" for number in range(1013, 9999, 611)])},
        ("Where is parcel {parcel}?", "Track {parcel} for me.", "Has {parcel} arrived?"),
        {"place": TOWNS, "status": ("in transit", "delivered", "delayed")},
        "Parcel {parcel} is {status}; it was last seen in {place}.",
        ("parcel",),
        "Where are {first} and {second}?",
        ("Where is my parcel?", "Has my order been shipped?"),
        "What is the parcel's number?",
    ),
    ToolTemplate(
        "book_table",
        "Book a table in a restaurant.",
        {
            "restaurant": ("string", "Its name", ("Casa Lume", "The Old Mill", "Sakura", "Nord")),
            "guests": ("integer", "How many people", range(2, 9)),
            "date": ("string", "The day, YYYY-MM-DD", DATES),
        },
        ("Book a table for {guests} at {restaurant} on {date}.", "Reserve {restaurant} for {guests} people on {date}."),
        {"booking": range(100, 999)},
        "Your table for {guests} at {restaurant} on {date} is booked, number {booking}.",
        ("restaurant",),
    ),
    ToolTemplate(
        "set_thermostat",
        "Set the temperature of a room.",
        {
            "room": ("string", "The room", ("kitchen", "bedroom", "office", "living room")),
            "degrees": ("number", "Degrees Celsius", (18, 19.5, 20, 21.5, 22)),
        },
        ("Set the {room} to {degrees} degrees.", "Make the {room} {degrees} degrees warm."),
        {"ok": True},
        "The {room} is set to {degrees} degrees.",
        ("room",),
        "Set the {first} and the {second} to {degrees} degrees.",
    ),
    ToolTemplate(
        "find_flights",
        "Find flights between two cities.",
        {
            "origin": ("string", "City of departure", CITIES[:5]),
            "destination": ("string", "City of arrival", CITIES[5:]),
            "date": ("string", "The day, YYYY-MM-DD", DATES),
        },
        (
            "Find flights from {origin} to {destination} on {date}.",
            "I want to fly from {origin} to {destination} on {date}.",
        ),
        {"flight": ("NX 204", "QV 17", "LD 880"), "price": range(60, 900)},
        "Flight {flight} from {origin} to {destination} costs {price} euros.",
        ("destination",),
        "Find flights from {origin} to {first} and to {second} on {date}.",
    ),
    ToolTemplate(
        "add_to_list",
        "Add an item to a list.",
        {
            "item": ("string", "What to add", FOODS),
            "quantity": ("integer", "How many", range(1, 12)),
            "list_name": ("string", "The list", ("shopping", "party")),
        },
        ("Add {quantity} {item} to my {list_name} list.", "Put {quantity} {item} on the {list_name} list."),
        {"added": True},
        "I added {quantity} {item} to your {list_name} list.",
        ("item",),
        "Add {quantity} {first} and {quantity} {second} to my {list_name} list.",
    ),
    ToolTemplate(
        "get_account_balance",
        "Get the balance of a bank account.",
        {"account": ("string", "The account's number", [f"AC-{number}" for number in range(210, 990, 53)])},
        ("How much money is in {account}?", "Show the balance of {account}."),
        {"balance": range(12, 5000)},
        "The balance of {account} is {balance} euros.",
        ("account",),
        "How much money is in {first} and in {second}?",
        ("How much money do I have?",),
        "Which account do you mean?",
    ),
)
