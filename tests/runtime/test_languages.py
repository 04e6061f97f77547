"""Requests in languages that training did not see."""

from __future__ import annotations

import pytest

import edge_slm
from edge_slm.distill.teachers.grammar import GrammarTeacher
from edge_slm_runtime.languages import reads_as_english

FOREIGN = {
    "German": [
        "ein roter Fuchs im Schnee",
        "eine gemütliche Hütte in den Bergen bei Nacht",
        "der alte Leuchtturm über dem Meer",
        "Zwei Kinder spielen mit einem Hund am Strand",
        "Plakat für ein Jazzkonzert im Park",
        "eine Katze auf dem Dach",
        "das Boot auf dem See",
        "roter Fuchs",
        "Sonnenuntergang über der Stadt",
        "Bitte zeichne einen Drachen, der über eine brennende Burg fliegt",
    ],
    "French": [
        "un renard roux dans la neige",
        "une vieille maison au bord de la mer",
        "le phare sous la pluie",
        "Affiche pour un concert de jazz dans le parc",
        "deux enfants jouent avec un chien sur la plage",
        "un chat noir",
        "la tour Eiffel au coucher du soleil",
        "portrait d'une femme avec un chapeau rouge",
        "Une forêt enchantée avec des champignons lumineux et des fées",
    ],
    "Spanish": [
        "un zorro rojo en la nieve",
        "una casa vieja junto al mar",
        "el faro bajo la lluvia",
        "cartel para un concierto de jazz en el parque",
        "dos niños juegan con un perro en la playa",
        "un gato negro",
        "retrato de una mujer con sombrero rojo",
        "una ciudad futurista de noche con luces de neón",
    ],
    "Italian": [
        "una volpe rossa nella neve",
        "una vecchia casa in riva al mare",
        "il faro sotto la pioggia",
        "manifesto per un concerto jazz nel parco",
        "due bambini giocano con un cane sulla spiaggia",
        "ritratto di una donna con un cappello rosso",
        "un gatto nero sul tetto",
    ],
    "Portuguese": [
        "uma raposa vermelha na neve",
        "uma casa velha à beira do mar",
        "o farol sob a chuva",
        "cartaz para um concerto de jazz no parque",
        "duas crianças brincam com um cachorro na praia",
        "retrato de uma mulher com chapéu vermelho",
        "um gato preto",
    ],
    "Dutch": [
        "een rode vos in de sneeuw",
        "een oud huis aan de zee",
        "de vuurtoren in de regen",
        "poster voor een jazzconcert in het park",
        "twee kinderen spelen met een hond op het strand",
        "portret van een vrouw met een rode hoed",
        "een zwarte kat",
    ],
    "other Latin": [
        "czerwony lis na śniegu w ciemnym lesie",
        "en röd räv i snön vid den gamla stugan",
        "en rød ræv i sneen under en klar himmel",
        "karda kırmızı bir tilki ve eski bir ev",
        "punainen kettu lumessa vanhan mökin vieressä",
        "červená liška ve sněhu u staré chalupy",
        "piros róka a hóban egy régi ház mellett",
        "o vulpe roșie în zăpadă lângă o casă veche",
        "seekor rubah merah di salju dekat rumah tua",
        "một con cáo đỏ trong tuyết bên ngôi nhà cũ",
    ],
    "other scripts": [
        "рыжая лиса в снегу",
        "雪の中の赤い狐",
        "雪地里的红狐狸",
        "눈 속의 붉은 여우",
        "ثعلب أحمر في الثلج",
        "שועל אדום בשלג",
        "बर्फ में लाल लोमड़ी",
        "κόκκινη αλεπού στο χιόνι",
        "สุนัขจิ้งจอกแดงในหิมะ",
        "руда лисиця в снігу",
        "червена лисица в снега",
        "a picture of 雪の中の赤い狐",
    ],
}
# Too short to tell, or of words that English shares.
MISSED = [
    "roter Fuchs",
    "un chat noir",
    "un gato negro",
    "o farol sob a chuva",
    "um gato preto",
    "de vuurtoren in de regen",
    "een zwarte kat",
    "seekor rubah merah di salju dekat rumah tua",
]
ENGLISH = [
    "a red fox in the snow",
    "dog, ball, park, child",
    "Plaza de la Luz at dawn",
    "Paseo de la Reforma, Mexico City",
    "El Capitan",
    "crème brûlée",
    "crème de menthe on a marble table",
    "la la land poster",
    "a café sign that says “Bienvenue à la fête”",
    "a neon sign with the text '東京 ラーメン'",
    "Hawaiʻi from above",
    "a π day cake",
    "ａ ｒｅｄ ｆｏｘ",
    "epic portrait photography beautiful goddess detailed realistic 8k",
    '"das ist ein Test"',
    "42",
]


def test_other_languages_are_noticed() -> None:
    asked = [request for requests in FOREIGN.values() for request in requests]
    assert len(asked) == 70
    assert [request for request in asked if reads_as_english(request)] == MISSED


@pytest.mark.parametrize("request_text", ENGLISH)
def test_english_passes(request_text: str) -> None:
    assert reads_as_english(request_text)


@pytest.mark.parametrize("task", ["image", "video", "design", "scene", "tags", "title"])
def test_invented_requests_are_english(task: str) -> None:
    requests = GrammarTeacher().invent(task, 500, seed=3)
    assert [request for request in requests if not reads_as_english(request)] == []


def test_an_answer_warns() -> None:
    asked, settings = "ein Fuchs mit einem Hut", {"task": "image", "words": 3}
    with edge_slm.load(engine="onnxruntime", threads=1) as slm:
        (warning,) = slm.generate(asked, **settings).warnings
        assert "does not read as English" in warning
        (result,) = slm.generate_batch([asked], **settings)
        assert result.warnings == (warning,)
        assert all(one.warnings[0] == warning for one in slm.variations(asked, 2, **settings))
        assert not slm.generate("a fox with a hat", **settings).warnings
        tagged = "a fox --no der, das, ein, mit, und"
        assert not slm.generate(tagged, **settings).warnings
