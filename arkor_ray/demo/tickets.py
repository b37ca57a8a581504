"""Support tickets, made from parts: who writes, about which product, what went wrong, how much it matters.

Both the base model's corpus and the triage data set draw from here. The corpus answers a ticket in friendly prose, the
data set in JSON, so fine-tuning has to change the form of the answer while the base model already knows the subject.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

CATEGORIES = ("billing", "account", "bug", "delivery", "question", "feature")
URGENCIES = ("low", "medium", "high")

PRODUCTS = {
    "Nimbus": "a mail app for small teams",
    "Orbit": "a wireless router for the home",
    "PixelPad": "a drawing tablet for students",
    "Harbor": "a customer list for small shops",
    "Lumen": "a reading lamp that you can dim",
    "Atlas": "a backup service for photos",
    "TrailCam": "a camera for the garden",
    "BrewMate": "a coffee machine with a timer",
    "Quill": "a notes app for writers",
    "Fjord": "a speaker for the kitchen",
    "Kestrel": "a bike computer with a map",
    "Ledger": "an invoice tool for freelancers",
}

NAMES = (
    "Ann", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kim", "Lena",
    "Marco", "Nadia", "Omar", "Paula", "Rosa", "Sam", "Tomas", "Vera", "Yuki", "Zoe",
)  # fmt: skip


@dataclass(frozen=True)
class Issue:
    """One thing that goes wrong. `{p}` in every text stands for the product."""

    category: str
    told: tuple[str, ...]  # the customer's words, a clause that follows "I see that" or starts a sentence
    summary: str  # a headline, without a subject
    you: str  # the same as a clause about "you", for an answer in prose
    next_action: str  # an order to the support team


ISSUES = (
    # billing
    Issue("billing", ("I was charged twice for {p} this month", "my card shows two payments for {p}",
                      "you took the money for {p} two times"),
          "Charged twice for {p}", "you were charged twice for {p}", "Refund the duplicate charge"),
    Issue("billing", ("I cannot find the invoice for {p}", "the invoice for {p} never came",
                      "my accountant needs the missing invoice for {p}"),
          "Missing invoice for {p}", "the invoice for {p} is missing", "Send the invoice again"),
    Issue("billing", ("I cancelled {p} last week but the refund is not here", "I still wait for my refund for {p}",
                      "the refund you promised for {p} has not come"),
          "Refund for {p} not received", "the refund for {p} has not arrived", "Check the refund status"),
    Issue("billing", ("the price of {p} went up without notice", "my bill for {p} is higher than before",
                      "I pay more for {p} than the price you showed"),
          "Price of {p} is higher than expected", "the price of {p} is higher than expected", "Explain the new price"),
    Issue("billing", ("my card was declined when I tried to pay for {p}", "the payment for {p} fails every time",
                      "I cannot pay for {p} because the card form fails"),
          "Payment for {p} fails", "the payment for {p} fails", "Offer another payment method"),
    # account
    Issue("account", ("I cannot log in to {p}", "the login page of {p} rejects my password",
                      "{p} says that my password is wrong"),
          "Cannot log in to {p}", "you cannot log in to {p}", "Send a password reset link"),
    Issue("account", ("my {p} account is locked", "{p} locked me out after three tries",
                      "it says that my account for {p} is blocked"),
          "Account for {p} is locked", "your account for {p} is locked", "Unlock the account"),
    Issue("account", ("I want to change the email address of my {p} account", "my {p} account still has my old email",
                      "please move my {p} account to a new email"),
          "Wants to change the email for {p}", "you want to change the email for {p}", "Verify the owner and change the email"),
    Issue("account", ("please delete my {p} account", "I want my {p} account and all my data removed",
                      "close my account for {p} and erase everything"),
          "Wants the {p} account deleted", "you want the {p} account deleted", "Confirm and delete the account"),
    Issue("account", ("the code to sign in to {p} never arrives", "{p} does not send me the security code",
                      "I get no text message with the code for {p}"),
          "No sign-in code for {p}", "you get no sign-in code for {p}", "Send a backup code"),
    # bug
    Issue("bug", ("{p} crashes when I open it", "{p} closes by itself after a few seconds",
                  "every time I start {p} it crashes"),
          "Crash when opening {p}", "{p} crashes when you open it", "Ask for the crash log"),
    Issue("bug", ("{p} is very slow since the update", "after the update {p} takes minutes to answer",
                  "{p} became slow when I installed the new version"),
          "{p} is slow after the update", "{p} is slow after the update", "Roll back the update"),
    Issue("bug", ("{p} does not save my changes", "everything I edit in {p} is lost the next day",
                  "my changes in {p} are gone after I close it"),
          "{p} loses saved changes", "{p} loses your changes", "Restore the data from backup"),
    Issue("bug", ("{p} shows an error about the server", "there is a red error message on {p}",
                  "I only see an error screen on {p}"),
          "{p} shows an error message", "{p} shows an error message", "Ask for a screenshot"),
    Issue("bug", ("{p} does not connect to my phone", "my phone no longer finds {p}",
                  "the connection between {p} and my phone drops"),
          "{p} does not connect to the phone", "{p} does not connect to your phone", "Guide through a new pairing"),
    # delivery
    Issue("delivery", ("my {p} order has not arrived", "I ordered {p} two weeks ago and nothing came",
                       "the parcel with {p} is still not here"),
          "Order of {p} has not arrived", "your order of {p} has not arrived", "Trace the parcel"),
    Issue("delivery", ("{p} arrived broken", "the box was damaged and {p} is broken",
                       "I opened the parcel and {p} has a crack"),
          "{p} arrived damaged", "{p} arrived damaged", "Send a replacement"),
    Issue("delivery", ("I got the wrong colour of {p}", "you sent me {p} in the wrong colour",
                       "the {p} in the parcel is not the colour I ordered"),
          "Wrong colour of {p} delivered", "you got the wrong colour of {p}", "Arrange an exchange"),
    Issue("delivery", ("please send {p} to a different address", "I moved and {p} goes to my old address",
                       "can you change the address for my {p} parcel"),
          "Address change for the {p} order", "you need another address for {p}", "Update the shipping address"),
    Issue("delivery", ("a cable is missing in the {p} box", "the box of {p} came without the cable",
                       "there was no cable with {p} in the parcel"),
          "Cable missing with {p}", "the cable for {p} is missing", "Ship the missing part"),
    # question
    Issue("question", ("how do I set up {p}", "I do not understand the first steps with {p}",
                       "where can I read how to set up {p}"),
          "How to set up {p}", "you want to set up {p}", "Send the setup guide"),
    Issue("question", ("does {p} work without internet", "can I use {p} offline on a train",
                       "is it possible to use {p} with no network"),
          "Asks if {p} works offline", "you want to use {p} offline", "Explain the offline mode"),
    Issue("question", ("how can I export my data from {p}", "is there a way to get my data out of {p}",
                       "where is the export button in {p}"),
          "How to export data from {p}", "you want to export data from {p}", "Send the export steps"),
    Issue("question", ("how long is the warranty for {p}", "is my {p} still under warranty",
                       "what does the warranty of {p} cover"),
          "Asks about the warranty of {p}", "you ask about the warranty of {p}", "Send the warranty terms"),
    Issue("question", ("can two people share {p}", "how many people can use one {p} plan",
                       "may my sister use my {p} too"),
          "Asks about sharing {p}", "you want to share {p}", "Explain the family plan"),
    # feature
    Issue("feature", ("I would love a dark mode in {p}", "please add a dark theme to {p}",
                      "{p} is too bright at night and needs a dark mode"),
          "Wants a dark mode in {p}", "you would like a dark mode in {p}", "Add a vote for dark mode"),
    Issue("feature", ("please add a calendar to {p}", "it would be great if {p} had a calendar",
                      "I wish that {p} could show my calendar"),
          "Wants a calendar in {p}", "you would like a calendar in {p}", "Forward the idea to the product team"),
    Issue("feature", ("please translate {p} into Spanish", "my parents need {p} in Spanish",
                      "I wish that {p} had a Spanish version"),
          "Wants {p} in Spanish", "you would like {p} in Spanish", "Add a vote for Spanish"),
    Issue("feature", ("could {p} remind me every morning", "I would like a daily reminder from {p}",
                      "a reminder each day would make {p} better"),
          "Wants daily reminders in {p}", "you would like daily reminders in {p}", "Log the reminder request"),
    Issue("feature", ("I want to use {p} with my voice", "please add voice control to {p}",
                      "it would help me if {p} listened to my voice"),
          "Wants voice control in {p}", "you would like voice control in {p}", "Share the roadmap"),
)  # fmt: skip

_CUES = {
    "high": (
        "We cannot work at all until this is fixed.",
        "This is urgent, please help me today.",
        "I need an answer right now.",
        "We lose money every hour.",
        "Please treat this as an emergency.",
        "My boss is waiting and I am really angry.",
    ),
    "medium": (
        "Please look into it this week.",
        "I hope that you can help me soon.",
        "It is annoying but I can wait a few days.",
        "Please tell me what to do next.",
        "A reply by Friday would be good.",
        "I would like to have this settled soon.",
    ),
    "low": (
        "There is no rush.",
        "Answer whenever you have time.",
        "It is not important, I just wonder.",
        "Take your time with this.",
        "This can wait until next month.",
        "It is only a small thing.",
    ),
}
# Low, medium, high: a broken thing is urgent more often than a wish.
_URGENCY_WEIGHTS = {
    "billing": (2, 4, 4),
    "account": (2, 4, 4),
    "bug": (2, 4, 4),
    "delivery": (2, 4, 4),
    "question": (5, 4, 1),
    "feature": (6, 3, 1),
}
_GREETINGS = ("Hi,", "Hello,", "Good morning,", "Dear support,", "Hey there,", "Hello team,")
_ASKING = ("how", "does", "can", "could", "is it", "is my", "is there", "where", "what", "may")
_DETAILS = (
    "I have been a customer for {n} years.",
    "My order number is {o}.",
    "It started on {d}.",
    "I wrote to you on {d} too.",
    "I already tried it {n} times.",
    "My plan is the {t} one.",
)
_THANKS = ("Thanks,", "Thank you,", "Best,", "Regards,", "Cheers,")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Ticket:
    """One customer's message and what is true about it."""

    text: str
    product: str
    issue: Issue
    urgency: str
    sender: str


def make_ticket(random: Random, *, held_out: bool = False, plain: bool = False) -> Ticket:
    """Draw a ticket; a `plain` one says what is wrong and how much it matters, and nothing else.

    Pairs of product and issue fall into two fixed sets: `held_out` ones are met nowhere in training.
    """
    while True:
        issue, product = random.choice(ISSUES), random.choice(tuple(PRODUCTS))
        if is_held_out(issue, product) == held_out:
            break
    (urgency,) = random.choices(URGENCIES, _URGENCY_WEIGHTS[issue.category])
    sender = random.choice(NAMES)
    clause = random.choice(issue.told).format(p=product)
    end = "?" if clause.startswith(_ASKING) else "."
    trouble = clause[0].upper() + clause[1:] + end
    cue = random.choice(_CUES[urgency])
    if plain:
        return Ticket(f"{trouble} {cue}", product, issue, urgency, sender)
    parts = [random.choice(_GREETINGS)] if random.random() < 0.6 else []
    parts.append(trouble)
    details = [_detail(random)] if random.random() < 0.45 else []
    parts += [*details, cue] if random.random() < 0.7 else [cue, *details]
    if random.random() < 0.5:
        parts.append(f"{random.choice(_THANKS)} {sender}")
    return Ticket(" ".join(parts), product, issue, urgency, sender)


def is_held_out(issue: Issue, product: str) -> bool:
    """Whether no training ticket has this issue with this product: one pair in eight."""
    # crc32 rather than hash(), which differs between processes.
    return zlib.crc32(f"{product}|{issue.summary}".encode()) % 8 == 0


def _detail(random: Random) -> str:
    detail = random.choice(_DETAILS)
    return detail.format(
        n=random.randint(2, 9),
        o=random.randint(100, 999),
        d=random.choice(_DAYS),
        t=random.choice(("free", "basic", "family", "team")),
    )
