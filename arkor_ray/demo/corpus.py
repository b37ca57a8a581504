"""What the base model reads: short generated conversations, enough to learn plain English about a few subjects.

Tickets are answered as a friendly person would. Other conversations teach what fine-tuning builds on: copying words
from the question, naming the team that a problem belongs to, and writing small JSON objects when asked to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from arkor_ray.demo.tickets import CATEGORIES, ISSUES, NAMES, PRODUCTS, Ticket, is_held_out, make_ticket

Messages = list[dict[str, str]]


def make_corpus(documents: int, seed: int = 0) -> list[Messages]:
    """Conversations in OpenAI `messages` form, in the order to be read; the same arguments give the same ones.

    The first third are short questions about plain tickets. A small model that reads nothing else at first learns
    within a hundred steps to look words up in the question; in the full mixture that takes more than ten times as long.
    """
    random = Random(f"corpus-{seed}")
    first = documents // 3
    makers, weights = zip(*_MIXTURE, strict=True)
    mixed = random.choices(makers, weights, k=documents - first)
    return [*(_look_up(random, plain=True) for _ in range(first)), *(maker(random) for maker in mixed)]


def _ticket_reply(random: Random) -> Messages:
    ticket = make_ticket(random)
    return _conversation(random, ticket.text, _prose(ticket, random), system=0.6)


def _look_up(random: Random, plain: bool = False) -> Messages:
    ticket = make_ticket(random, plain=plain)
    kind = random.choices(tuple(_QUESTIONS), _QUESTION_WEIGHTS)[0]
    answer = {
        "product": f"{ticket.product}.",
        "headline": f"{ticket.issue.summary.format(p=ticket.product)}.",
        "urgency": _URGENCY[ticket.urgency],
        "team": f"That is for the {ticket.issue.category} team.",
        "task": f"{ticket.issue.next_action}.",
    }[kind]
    question = random.choice(_QUESTIONS[kind])
    return _conversation(random, f"{question} {ticket.text}", answer, system=0.0 if plain else 0.15)


def _echo(random: Random) -> Messages:
    words = " ".join(random.choice(_WORDS) for _ in range(random.randint(1, 5)))
    question = random.choice(("Repeat after me: {}", "Say this again: {}", "Please copy: {}", "Echo {}"))
    return _conversation(random, question.format(words), words)


def _echo_number(random: Random) -> Messages:
    number = str(random.randint(10, 99999))
    question = random.choice(("Repeat the number {}", "Say {}", "Read this number to me: {}"))
    answer = random.choice(("The number is {}.", "{}"))
    return _conversation(random, question.format(number), answer.format(number))


def _as_json(random: Random) -> Messages:
    keys = random.sample(tuple(_FIELDS), random.randint(2, 4))
    values = {key: random.choice(_FIELDS[key]) for key in keys}
    told = ", ".join(f"{key} {value}" for key, value in values.items())
    question = random.choice(("Write this as JSON: {}", "JSON please: {}", "Put this in a JSON object: {}"))
    return _conversation(random, question.format(told), json.dumps(values, separators=(",", ":")), system=0.0)


def _ticket_as_json(random: Random) -> Messages:
    ticket = make_ticket(random)
    facts = {
        "team": ticket.issue.category,
        "product": ticket.product,
        "level": ticket.urgency,
        "title": ticket.issue.summary.format(p=ticket.product),
        "task": ticket.issue.next_action,
    }
    keys = random.sample(tuple(facts), random.randint(1, 3))
    question = random.choice(("JSON with {}:", "Give me {} as JSON:", "Find {} and write JSON:"))
    answer = json.dumps({key: facts[key] for key in keys}, separators=(",", ":"))
    return _conversation(random, f"{question.format(', '.join(keys))} {ticket.text}", answer, system=0.0)


def _about_product(random: Random) -> Messages:
    product = random.choice(tuple(PRODUCTS))
    question = random.choice(("What is {}?", "Tell me about {}.", "Do you know {}?", "I read about {}. What is it?"))
    answer = f"{product} is {PRODUCTS[product]}. {random.choice(_ABOUT)}"
    return _conversation(random, question.format(product), answer, system=0.3)


def _small_talk(random: Random) -> Messages:
    question, answer = random.choice(_SMALL_TALK)
    name = random.choice(NAMES)
    return _conversation(random, question.format(n=name), answer.format(n=name), system=0.3)


def _list_words(random: Random) -> Messages:
    kind = random.choice(tuple(_KINDS))
    count, spoken = random.choice(((2, "two"), (3, "three"), (4, "four")))
    chosen = random.sample(_KINDS[kind], count)
    answer = ", ".join(chosen[:-1]) + f" and {chosen[-1]}."
    question = random.choice(("Name {c} {k}.", "Give me {c} {k}.", "I need {c} {k}, please."))
    return _conversation(random, question.format(c=spoken, k=kind), answer[0].upper() + answer[1:])


def _follow_up(random: Random) -> Messages:
    ticket = make_ticket(random)
    first = _conversation(random, ticket.text, _prose(ticket, random), system=0.4)
    question, answer = random.choice(_FOLLOW_UPS)
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_MIXTURE: tuple[tuple[Callable[[Random], Messages], int], ...] = (
    (_ticket_reply, 38),
    (_look_up, 22),
    (_ticket_as_json, 12),
    (_as_json, 6),
    (_echo, 6),
    (_echo_number, 2),
    (_small_talk, 6),
    (_about_product, 5),
    (_list_words, 4),
    (_follow_up, 3),
)


def _conversation(random: Random, user: str, assistant: str, system: float = 0.15) -> Messages:
    """One question, one answer; with the probability `system` under some instructions that change nothing."""
    instructions = [{"role": "system", "content": random.choice(_SYSTEM)}] if random.random() < system else []
    return [*instructions, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _prose(ticket: Ticket, random: Random) -> str:
    issue = ticket.issue
    parts = [
        random.choice(_SORRY if issue.category not in ("question", "feature") else _NICE),
        f"I understand that {issue.you.format(p=ticket.product)}.",
        f"This goes to our {issue.category} team.",
        f"The next step: {issue.next_action[0].lower()}{issue.next_action[1:]}.",
        _URGENCY[ticket.urgency],
    ]
    if random.random() < 0.4:
        parts.append(random.choice(_CLOSING))
    return " ".join(parts)


_QUESTIONS = {
    "product": ("Which product is this about?", "What did the customer buy?", "Name the product:"),
    "headline": ("Say it in short:", "What is it about?", "Give me a headline:"),
    "urgency": ("How urgent is this?", "Can this wait?", "Does this need a fast answer?"),
    "team": ("Which team should read this?", "Who takes care of this?", "Where does this belong?"),
    "task": ("What should we do?", "What is the next step here?", "How do we help?"),
}
_QUESTION_WEIGHTS = (5, 3, 1, 1, 1)
_SYSTEM = (
    "You are a friendly assistant.",
    "You help the customers of a small company. Be kind and clear.",
    "Reply to support tickets in plain words.",
    "You are a support agent and nothing else. Be short and polite.",
    "You answer questions about our products: mail, lamps, cameras and more.",
    "Talk to the customer, name the team, and say the next step.",
    "You read support tickets. Tell the customer what happens next, one step at a time.",
    "You triage support tickets. Reply in whole sentences: category, urgency, summary and next step.",
    "Be helpful. Use whole sentences.",
    "Reply in plain words, never with JSON.",
    "A program turns each ticket into one JSON object. You just talk to the customer.",
)
_SORRY = (
    "I am sorry to hear that.",
    "Oh no, that should not happen.",
    "Sorry for the trouble.",
    "Thank you for telling us.",
)
_NICE = ("Thank you for your message.", "Good that you ask.", "Thanks for writing to us.", "That is a good point.")
_URGENCY = {
    "high": "This is urgent, so we start right away.",
    "medium": "We will take care of it this week.",
    "low": "We will answer when there is time.",
}
_CLOSING = ("Have a nice day!", "Please write again if you need more help.", "Thank you for your patience.")
_ABOUT = ("Many people like it.", "It is easy to use.", "You can try it for free.", "It comes in three colours.")
_SMALL_TALK = (
    ("Hi, I am {n}.", "Hello {n}, how can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("My name is {n}. What is my name?", "Your name is {n}."),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Thank you so much.", "You are welcome."),
    ("Goodbye from {n}.", "Goodbye {n}, have a nice day!"),
    ("Who are you?", "I am a small language model from the demo."),
    ("Can you help me?", "Yes, I can. What is it about?"),
    ("Tell me a joke.", "Why was the lamp so happy? It saw the light."),
    ("Good night.", "Good night, sleep well."),
)
_FOLLOW_UPS = (
    ("Thank you!", "You are welcome. Have a nice day!"),
    ("When do I hear from you?", "You will hear from us soon."),
    ("Is this right?", "Yes, this is right."),
    ("Are you a person?", "No, I am a small language model from the demo."),
)
_KINDS = {
    "colours": ("red", "blue", "green", "yellow", "black", "white"),
    "animals": ("cat", "dog", "bird", "horse", "fish", "cow"),
    "fruits": ("apple", "pear", "plum", "cherry", "orange", "lemon"),
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "products": tuple(PRODUCTS),
}
_FIELDS = {
    "name": NAMES,
    "product": tuple(PRODUCTS),
    "team": CATEGORIES,
    "colour": _KINDS["colours"],
    "day": _KINDS["days"],
    "title": tuple(
        issue.summary.format(p=product) for issue in ISSUES for product in PRODUCTS if not is_held_out(issue, product)
    ),
    "task": tuple(issue.next_action for issue in ISSUES),
    "level": ("low", "medium", "high"),
    "category": CATEGORIES,
    "urgency": ("low", "medium", "high"),
    "summary": tuple(PRODUCTS.values()),
    "nextAction": ("wait", "call back", "write a mail", "ask again", "go home"),
}
_WORDS = (*NAMES, *PRODUCTS, *(word for kind in _KINDS.values() for word in kind))
