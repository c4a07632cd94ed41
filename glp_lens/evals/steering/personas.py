"""Manners of speaking that a chat model can be told to take on, and questions to ask it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Persona:
    """A manner of speaking.

    Attributes:
        name: what results call it.
        towards: system prompts that ask for it.
        away: system prompts that ask for its opposite.
    """

    name: str
    towards: tuple[str, ...]
    away: tuple[str, ...]


PERSONAS = {
    each.name: each
    for each in (
        Persona(
            "pirate",
            ("You are an old pirate. Talk like a pirate in every sentence, about ships, gold and the sea.",
             "Answer as the captain of a pirate ship would, in rough sailors' talk."),
            ("You are an office clerk. Talk plainly, as people in an office do.",
             "Answer as a modern person in a city would, in everyday words."),
        ),
        Persona(
            "formal",
            ("Write in a very formal and polite manner, as in a letter to a court.",
             "You are a diplomat. Use stately, ceremonious language at all times."),
            ("Write very casually, as in a quick message to a close friend.",
             "You are a teenager chatting with a buddy. Use slang and short, loose sentences."),
        ),
        Persona(
            "cheerful",
            ("You are full of joy. Be delighted and excited about everything you are asked.",
             "Answer with great happiness and hope, as on the best day of your life."),
            ("You are sad and tired. Be gloomy about everything you are asked.",
             "Answer with sorrow and without hope, as on the worst day of your life."),
        ),
        Persona(
            "terse",
            ("Answer in as few words as you can. Never use a full sentence where a word will do.",
             "Be extremely brief: three to six words, nothing else."),
            ("Answer at great length, with many details, examples and side remarks.",
             "Be very wordy: explain everything slowly and thoroughly."),
        ),
        Persona(
            "poetic",
            ("You are a poet. Answer in verse, with images of nature, light and dreams.",
             "Speak in lyrical, flowery language full of metaphors."),
            ("You are an engineer. Answer with dry facts and figures only.",
             "Speak in plain technical language without any image or ornament."),
        ),
        Persona(
            "simple",
            ("Explain everything as to a child of five, with tiny words and friendly examples.",
             "You talk to toddlers. Use baby-simple sentences about toys, animals and candy."),
            ("Explain everything as to a professor, with technical terms and abstract reasoning.",
             "You talk to researchers. Use dense academic sentences and specialist terms."),
        ),
    )
}  # fmt: skip
"""Personas by name."""

QUESTIONS = (
    "What should I eat for breakfast?", "How do I learn to swim?", "Why is the sky blue?",
    "What makes a good friend?", "How can I sleep better?", "Where should I go on holiday?",
    "What is the best way to save money?", "How do plants grow?", "Can you tell me about the moon?",
    "What do you think of rainy days?", "How do I cook rice?", "Why do people dance?",
    "What is a good present for my mother?", "How does a bicycle stay upright?", "What are dogs good for?",
    "How should I begin my day?", "What is your advice for a job interview?", "Why do we dream?",
    "How do I make new friends?", "What happens in winter?", "Is it good to read books?",
    "How do birds fly?", "What should I wear to a party?", "How can I be less nervous?",
    "Why is exercise important?", "What is the ocean like?", "How do I keep my room tidy?",
    "What is music for?", "How are clouds made?", "Should I get a cat?",
    "How do I bake bread?", "What can I do on a weekend?", "Why do leaves change colour?",
    "How do I write a good letter?", "What is interesting about history?", "How do I fix a flat tyre?",
    "What is it like to live in a city?", "How can I help my neighbours?", "Why do we need water?",
    "What games can we play outside?", "How do I learn a language?", "What is the sun made of?",
    "How do I take good pictures?", "Why do people travel?", "What makes a house a home?",
    "How does the heart work?", "What should I plant in my garden?", "How do I stop worrying?",
    "What is the use of school?", "How do fish breathe?", "Can you describe a forest?",
    "What is a good way to relax?", "How do I choose a phone?", "Why do stars shine?",
    "How do I say sorry?", "What do you know about trains?", "How can I eat healthier?",
    "Why do people like football?", "What is a rainbow?", "How do I carry a heavy box?",
    "What is a good name for a dog?", "How do I get to know a new town?", "Why is sleep important?",
    "What can we learn from old people?", "How do bees make honey?", "How do I paint a wall?",
    "What is the best season?", "How can I save time?", "Why does ice float?",
    "What do I need for camping?", "How do I teach a child to read?", "What is a good hobby?",
    "How do I prepare for a storm?", "Why do we laugh?", "What should I know about cars?",
    "How is paper made?", "What is the desert like?", "How can I remember names?",
    "Why do cats purr?", "What should I do when I am bored?", "How do I make tea?",
    "What is the point of working hard?", "How do mountains form?", "What makes a story good?",
    "How do I greet a stranger?", "What is a library for?", "How can I become stronger?",
    "Why are there waves in the sea?", "What can I cook with potatoes?", "How do I keep a secret?",
    "What is it like to grow old?", "How does a kite fly?", "What should I say at a wedding?",
    "How do I find my way without a map?", "Why do we have holidays?", "What is good about the countryside?",
    "How do I clean my shoes?", "What do you think of the future?", "How do I win at chess?",
    "Why does bread rise?", "What is a market like?", "How can I be a better listener?",
    "What is the best thing about mornings?", "How do I look after a horse?", "Why do we forget things?",
    "What is snow?", "How do I build a fire?", "What makes people happy?",
    "How do I choose a good book?", "What is a bridge for?", "How can I use less plastic?",
    "Why is honesty important?", "What do I do with old clothes?", "How do I grow tomatoes?",
    "What is thunder?", "How do I say no politely?", "What can I see in a museum?",
    "How do I ride a horse?", "Why do we celebrate birthdays?", "What is a good way to learn history?",
)  # fmt: skip
"""Everyday questions that any manner of speaking can answer."""
