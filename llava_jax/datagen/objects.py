"""Which objects a text names: COCO's categories, by a table of synonyms and their plurals, whole words only.

So are hallucinated objects counted by CHAIR (Rohrbach et al. 2018). A name is not counted where it is denied ("no dog",
"without any cars") or part of another one ("train station"); a word that may be one of several categories ("bike") is
all of them.
"""

import re
from collections.abc import Iterable, Iterator

# category: what else it is called
SYNONYMS = {
    "person": "man woman boy girl child kid baby toddler infant people adult lady gentleman guy teenager human "
    "pedestrian passenger player rider surfer skier snowboarder skateboarder cyclist biker driver worker chef cook "
    "waiter waitress vendor customer shopper officer policeman firefighter fireman soldier student teacher doctor "
    "nurse farmer batter catcher umpire referee athlete swimmer dancer musician tourist spectator bystander audience "
    "crowd couple family bride groom mother father mom dad daughter son parent grandmother grandfather brother "
    "sister businessman sportsman fisherman cowboy jockey",
    "bicycle": "bike cycle tricycle",
    "car": "automobile sedan suv taxi cab minivan hatchback jeep convertible",
    "motorcycle": "motorbike bike moped scooter",
    "airplane": "plane aeroplane aircraft jet jetliner airliner biplane seaplane",
    "bus": "minibus",
    "train": "locomotive tram subway",
    "truck": "lorry pickup semi-truck firetruck",
    "boat": "ship canoe kayak sailboat yacht ferry rowboat raft motorboat speedboat gondola",
    "traffic light": "traffic-light stoplight traffic_signal",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "",
    "bird": "duck goose pigeon seagull gull parrot eagle owl swan crow sparrow penguin flamingo ostrich hawk heron "
    "pelican rooster hen peacock duckling",
    "cat": "kitten kitty feline",
    "dog": "puppy pup canine dalmatian poodle terrier labrador bulldog dachshund",
    "horse": "pony foal stallion mare colt",
    "sheep": "lamb ewe",
    "cow": "cattle bull calf ox bovine heifer",
    "elephant": "",
    "bear": "grizzly polar_bear panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "rucksack knapsack",
    "umbrella": "parasol",
    "handbag": "purse hand_bag tote_bag",
    "tie": "necktie bow_tie bowtie",
    "suitcase": "luggage suit_case briefcase",
    "frisbee": "flying_disc",
    "skis": "ski",
    "snowboard": "snow_board",
    "sports ball": "ball baseball basketball football soccer_ball tennis_ball volleyball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "baseball_mitt catcher's_mitt mitt",
    "skateboard": "skate_board",
    "surfboard": "surf_board longboard",
    "tennis racket": "racket racquet tennis_racquet",
    "bottle": "",
    "wine glass": "wineglass goblet",
    "cup": "mug teacup coffee_cup",
    "fork": "",
    "knife": "",
    "spoon": "",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger hamburger cheeseburger",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog",
    "pizza": "",
    "donut": "doughnut",
    "cake": "cupcake cheesecake",
    "chair": "armchair stool recliner",
    "couch": "sofa loveseat",
    "potted plant": "plant houseplant",
    "bed": "",
    "dining table": "table",
    "toilet": "urinal",
    "tv": "television television_set flat_screen",
    "laptop": "notebook_computer laptop_computer",
    "mouse": "computer_mouse",
    "remote": "remote_control game_controller",
    "keyboard": "",
    "cell phone": "phone cellphone mobile_phone smartphone mobile",
    "microwave": "microwave_oven",
    "oven": "stove",
    "toaster": "",
    "sink": "washbasin wash_basin",
    "refrigerator": "fridge freezer",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "pair_of_scissors",
    "teddy bear": "teddy stuffed_bear",
    "hair drier": "hair_dryer hairdryer blow_dryer",
    "toothbrush": "tooth_brush",
}
# What holds the name of a category and is no object of it.
OTHERS = (
    "train_station train_track bus_stop bus_station bus_lane bike_lane bike_path bike_rack car_park boat_dock "
    "boat_ramp table_tennis table_cloth table_top side_table coffee_table coffee_table_book table_lamp chair_lift "
    "clock_tower bird's_eye horse_race horse_racing orange_juice apple_juice apple_pie apple_tree orange_tree "
    "banana_tree carrot_cake toilet_paper phone_booth phone_call cup_holder book_store book_shelf bottle_cap "
    "power_plant flower_bed bed_frame remote_area remote_place remote_location mobile_home pizza_box dog_park "
    "dog_house cat_food dog_food stuffed_dog toy_car toy_train toy_boat toy_dog baseball_game baseball_field "
    "baseball_uniform baseball_cap baseball_team football_field football_game basketball_court basketball_game "
    "couple_of family_of crowd_of bear_in_mind"
)
# Words that are mostly something else (a colour, a verb) where they stand alone in the singular.
ONLY_PLURAL = ("orange", "bat", "mobile", "cook", "ski")
IRREGULAR = {
    "person": "persons", "people": "people", "child": "children", "mouse": "mice", "knife": "knives", "goose": "geese",
    "ox": "oxen", "calf": "calves", "sheep": "sheep", "cattle": "cattle", "scissors": "scissors", "skis": "skis",
    "aircraft": "aircraft", "luggage": "luggage", "broccoli": "broccoli", "human": "humans",
}  # fmt: skip


_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
_DENIALS = {"no", "not", "without", "neither", "nor", "isn't", "aren't", "wasn't", "weren't", "don't", "doesn't"}
_BETWEEN = {"a", "an", "any", "the", "other", "visible", "single", "one", "have", "see"}  # a denial and what it denies


class Finder:
    """Finds the categories that a text names: COCO's, and those of `categories` by their own names."""

    def __init__(self, categories: Iterable[str] = ()):
        names: dict[str, set[str]] = {}
        table = {**{category.lower(): "" for category in categories}, **SYNONYMS}
        for category, synonyms in table.items():
            for name in (category, *_names(synonyms)):
                for form in {plural(name), *(() if name in ONLY_PLURAL else (name,))}:
                    names.setdefault(form, set()).add(category)
        for name in _names(OTHERS):
            names |= {name: set(), plural(name): set()}
        self.categories = tuple(table)
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._longest: dict[str, int] = {}  # words of a name that begins with this one
        for name, found in names.items():
            if words := tuple(_TOKEN.findall(name)):
                self._names[words] = tuple(sorted(found))
                self._longest[words[0]] = max(len(words), self._longest.get(words[0], 0))

    def mentions(self, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each mention of an object, in lower case, and the categories that it may be one of."""
        words = _TOKEN.findall(text.lower().replace("’", "'"))
        start = 0
        while start < len(words):
            for length in range(self._longest.get(words[start], 0), 0, -1):
                name = tuple(words[start : start + length])
                if name in self._names:
                    if self._names[name] and not _denied(words, start):
                        yield " ".join(name), self._names[name]
                    start += length - 1
                    break
            start += 1

    def named(self, text: str) -> set[str]:
        """All categories that a text may name."""
        return {category for _, categories in self.mentions(text) for category in categories}


def _names(words: str) -> list[str]:
    return [word.replace("_", " ") for word in words.split()]


def _denied(words: list[str], start: int) -> bool:
    before = start - 1
    while before >= 0 and words[before] in _BETWEEN:
        before -= 1
    return before >= 0 and words[before] in _DENIALS


def plural(name: str) -> str:
    """The plural of a noun, or of the last word of several."""
    rest, _, word = name.rpartition(" ")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("man"):
        word = f"{word[:-3]}men"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word = f"{word}es"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = f"{word[:-1]}ies"
    else:
        word = f"{word}s"
    return f"{rest} {word}".strip()
