"""Words that keys, lists and codes are made of, without a dictionary to download."""

from __future__ import annotations

import random
import string
import uuid

_ADJECTIVES = """
able acid aged airy amber ample apt arid ashen azure bald bare basic bent bitter black bland blue blunt bold
bony brave brief bright brisk broad brown bulky busy calm chilly civil clean clear clever close cloudy coarse
cold cool crisp cruel curly curved damp dark deaf dear deep dense dim dizzy double dull dusty eager early easy
elder empty even exact extra faint fair false famous fancy far fast fat few fine firm flat fluffy foggy fond
frail free fresh frosty full funny gentle giant glad golden grand gray great green grim happy hard harsh heavy
high hollow honest hot huge humble icy idle inner jolly keen kind large late lazy lean light little lonely
long loose loud low loyal lucky mad main mellow mild minor misty modern moist narrow neat new nice noble
noisy odd old open orange oval pale patient plain polite poor proud pure purple quick quiet rare raw ready
red rich ripe rough round royal rude rusty sad safe salty sandy sharp shiny short shy silent silver simple
slim slow small smart smooth soft solid sour spicy square stale steep stiff still stout strange strong sunny
super sweet swift tall tame tart tender thick thin tidy tight tiny tired tough true upper vague vast warm
wary weak wet white whole wide wild wise witty wooden worthy yellow young
"""
_NOUNS = """
acorn actor anchor ankle apple apron arch arrow atlas aunt badge baker balcony banner barn barrel basin basket
beach beacon beard beetle bell bench berry bicycle blanket blossom boat bottle boulder bowl branch bread brick
bridge broom brush bubble bucket button cabin cactus camel candle canoe canvas captain carpet castle cattle
cave cellar chain chair chalk chapel cherry chimney church circle cliff clock cloud clover coach coast collar
comet compass copper coral corner cottage cotton cousin cradle crane crater crown crystal cup curtain dagger
daisy dancer deck desert diamond doctor donkey door dragon drawer dress drum duck eagle easel elbow engine
fabric falcon farmer feather fence fern ferry fiddle field finger flag flame flute forest fountain fox frame
garden garlic gate ghost giraffe glass glove goat grape guitar hammer harbor harp hat hawk hedge helmet hill
honey horse hotel house island ivory jacket jar jewel judge jungle kettle key king kitchen kite knight ladder
lake lamp lantern laurel leaf lemon letter lion lizard lock magnet maple marble market meadow mirror monkey
moon mountain museum mushroom napkin needle nest noodle notebook oak ocean olive onion orchard otter oven owl
paddle palace panther paper parrot peach pearl pebble pencil pepper piano pigeon pillow pirate planet plum
pocket poet pond potato prince pumpkin puzzle queen rabbit raven ribbon river robin rocket roof rope rose
sailor salmon sandal scarf school scissors shadow sheep shelf ship shoulder shovel singer skirt sky sled snail
sofa soldier spider spoon squirrel stable star statue stone stool stream string sugar summit swan sword table
tailor tavern teacher temple thimble thread throne thunder ticket tiger timber toad tomato torch tower train
trumpet tulip tunnel turkey turtle uncle valley vase velvet village violin wagon walnut walrus water weaver
whale wheat wheel whistle willow window winter wizard wolf wool worm yard zebra
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def word(draw: random.Random) -> str:
    """A key such as ``brave-otter``."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def words(draw: random.Random, count: int) -> list[str]:
    """Different words: plain ones as far as there are any, then pairs, then pairs with a number."""
    plain = [*ADJECTIVES, *NOUNS]
    if count <= len(plain):
        return draw.sample(plain, count)
    pairs = len(ADJECTIVES) * len(NOUNS)
    chosen = plain + [_pair(number, pairs) for number in range(count - len(plain))]
    draw.shuffle(chosen)
    return chosen


def _pair(number: int, pairs: int) -> str:
    adjective, noun = divmod(number % pairs * 7919 % pairs, len(NOUNS))  # neighbours share no word
    again = f"-{number // pairs}" if number >= pairs else ""
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}{again}"


def number(draw: random.Random, digits: int = 7) -> str:
    """A number of so many digits."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def identifier(draw: random.Random) -> str:
    """A UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def letters(draw: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """So many letters."""
    return "".join(draw.choices(alphabet, k=count))
