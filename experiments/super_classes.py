"""Pictures with super-classes, as iNaturalist 2018 has them: Tiny ImageNet's 200 classes in 14 groups.

    python -m experiments.super_classes TINY_IMAGENET DATA/inaturalist
    python -m experiments.accuracy --tasks inaturalist --data DATA

The source is a folder of parquet files, with a column of labels whose names begin with WordNet's numbers
("n01443537 goldfish"). The groups are ours: WordNet's for what lives, is eaten or is a landscape; by use for what
people make.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import ClassLabel, Dataset

GROUPS = {
    "amphibians, fish and reptiles": "goldfish; European fire salamander; bullfrog; tailed frog; American alligator; "
    "boa constrictor",
    "arachnids and crustaceans": "trilobite; scorpion; black widow; tarantula; centipede; American lobster; "
    "spiny lobster",
    "other invertebrates": "jellyfish; brain coral; snail; slug; sea slug; sea cucumber",
    "insects": "ladybug; fly; bee; grasshopper; walking stick; cockroach; mantis; dragonfly; monarch; "
    "sulphur butterfly",
    "birds": "goose; black stork; king penguin; albatross",
    "dogs and cats": "Chihuahua; Yorkshire terrier; golden retriever; Labrador retriever; German shepherd; "
    "standard poodle; tabby; Persian cat; Egyptian cat; cougar; lion",
    "other mammals": "koala; dugong; brown bear; guinea pig; hog; ox; bison; bighorn; gazelle; Arabian camel; "
    "orangutan; chimpanzee; baboon; African elephant; lesser panda",
    "clothing": "academic gown; apron; backpack; bikini; bow tie; cardigan; Christmas stocking; fur coat; gasmask; "
    "kimono; military uniform; miniskirt; neck brace; poncho; sandal; snorkel; sock; sombrero; sunglasses; "
    "swimming trunks; umbrella; vestment",
    "vehicles": "beach wagon; bullet train; convertible; freight car; go-kart; gondola; jinrikisha; lawn mower; "
    "lifeboat; limousine; moving van; police van; school bus; sports car; tractor; trolleybus",
    "buildings and streets": "altar; bannister; barbershop; barn; beacon; birdhouse; butcher shop; cash machine; "
    "cliff dwelling; confectionery; crane; dam; flagpole; fountain; maypole; obelisk; parking meter; pay-phone; "
    "picket fence; scoreboard; spider web; steel arch bridge; suspension bridge; thatch; triumphal arch; turnstile; "
    "viaduct; water tower",
    "furniture and vessels": "barrel; bathtub; beaker; beer bottle; bucket; chest; desk; dining table; frying pan; "
    "lampshade; pill bottle; plate; pop bottle; refrigerator; rocking chair; space heater; teapot; water jug; wok; "
    "wooden spoon",
    "tools, devices and toys": "abacus; basketball; binoculars; brass; broom; candle; cannon; CD player; chain; "
    "computer keyboard; drumstick; dumbbell; hourglass; iPod; magnetic compass; nail; oboe; organ; plunger; pole; "
    "potter's wheel; projectile; punching bag; reel; remote control; rugby ball; sewing machine; stopwatch; syringe; "
    "teddy; torch; volleyball; comic book",
    "food and plants": "guacamole; ice cream; ice lolly; pretzel; mashed potato; cauliflower; bell pepper; mushroom; "
    "orange; lemon; banana; pomegranate; meat loaf; pizza; potpie; espresso; acorn",
    "landscapes": "alp; cliff; coral reef; lakeside; seashore",
}


def groups_of(names: list[str]) -> list[int]:
    """The group of each class.

    Raises:
        ValueError: a class is in no group.
    """
    group = {name: index for index, members in enumerate(GROUPS.values()) for name in members.split("; ")}
    found = [group.get(name.partition(" ")[2]) for name in names]
    if None in found:
        raise ValueError(f"{names[found.index(None)]!r} is no class of Tiny ImageNet that stands in a group")
    return [index for index in found if index is not None]


def convert(source: Path, target: Path) -> None:
    """Write a file with the labels of the groups."""
    rows = Dataset.from_parquet(str(source))
    group = groups_of(rows.features["label"].names)
    labels = [group[label] for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", labels)
    rows.cast_column("label", ClassLabel(names=list(GROUPS))).to_parquet(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train.parquet and validation.parquet")
    parser.add_argument("target", type=Path, help="folder that gets the same files")
    args = parser.parse_args()
    files = sorted(args.source.glob("*.parquet"))
    if not files:
        parser.error(f"{args.source} has no parquet files")
    args.target.mkdir(parents=True, exist_ok=True)
    for file in files:
        convert(file, args.target / file.name)
        print(f"wrote {args.target / file.name}")


if __name__ == "__main__":
    main()
