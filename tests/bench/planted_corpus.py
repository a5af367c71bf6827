"""A corpus with known faults.

Clean documents in seven languages, junk of ten kinds, near-duplicates of known similarity, passages that two documents
quote, and evaluation items, verbatim and edited. Junk and a third of the clean documents are of one source, `web`.

Everything follows from a seed. Clean text is made of real words in random order, with the punctuation and the spacing
of its language, so that no two documents share a passage unless it was planted.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass, field
from typing import Any

# ruff: noqa: E501  # a lexicon a paragraph
LEXICONS = {
    "en": "the of and to in that have with be for it as was on are by this from or an they which one had not but what "
    "all were when there can more if out other about who time them some could people made over did down only way "
    "water long little very after words called just where most know through back much before line right means old "
    "same tell boy came want show also around farm three small set put end does another well large must big even "
    "land here turn hand high such follow act why ask men change went light kind off need house picture try again "
    "animal point mother world near build self earth father",
    "de": "der die und in den von zu das mit sich des auf ist im dem nicht ein eine als auch es an werden aus er hat "
    "dass sie nach wird bei einer um am sind noch wie einem einen so zum war haben nur oder aber vor zur bis mehr "
    "durch man sein wurde Prozent hatte kann gegen vom schon wenn habe seine Mark ihre dann unter wir soll ich eines "
    "Jahr zwei Jahren diese dieser wieder keine Uhr seiner worden will zwischen immer Millionen was sagte gibt alle "
    "seit muss wurden beim doch jetzt drei Haus Wasser Stadt gut neue damit bereits ihm Menschen gestern Berlin Wald",
    "ar": "في من على أن إلى التي عن مع هذا كان هذه الذي ما لا كل بعد بين حيث كما قد ذلك أو هو وقد كانت هي عند قبل غير "
    "عام خلال يوم أكثر العالم مدينة دولة الناس الماء البيت الكتاب السماء الأرض الشمس القمر البحر الجبل الطريق المدرسة "
    "الطفل الرجل المرأة العمل الحياة الوقت السنة الليل النهار الصباح المساء اللغة التاريخ العلم الفن الموسيقى السوق "
    "الطعام الخبز الشجرة الزهرة الحصان الطائر النهر الجسر القرية الملك الحرب السلام الباب النافذة الغرفة الحديقة صغير "
    "كبير جديد قديم جميل طويل قصير سريع بطيء بعيد قريب سهل صعب",
    "hi": "के में की है और से को का एक यह ने पर हैं भी था कि इस नहीं तो ही या हो कर लिए अपने वह थे जो तक कुछ साथ बाद "
    "किया गया थी करने दिया जा रहा समय लोग पानी घर किताब आकाश धरती सूरज चाँद सागर पहाड़ रास्ता विद्यालय बच्चा आदमी औरत "
    "काम जीवन साल रात दिन सुबह शाम भाषा इतिहास विज्ञान कला संगीत बाज़ार खाना रोटी पेड़ फूल घोड़ा पक्षी नदी पुल गाँव राजा "
    "युद्ध शांति दरवाज़ा खिड़की कमरा बगीचा छोटा बड़ा नया पुराना सुंदर लंबा तेज़ धीमा दूर पास आसान कठिन हिन्दी भारत दिल्ली",
    "zh": "的 一 是 在 不 了 有 和 人 这 中 大 为 上 个 国 我 以 要 他 时 来 用 们 生 到 作 地 于 出 就 分 对 成 会 可 主 发 年 "
    "动 同 工 也 能 下 过 子 说 产 种 面 而 方 后 多 定 行 学 法 所 民 得 经 十 三 之 进 着 等 部 度 家 电 力 里 如 水 化 高 "
    "城市 学校 老师 朋友 时间 历史 语言 科学 音乐 市场 天空 太阳 月亮 大海 山路 孩子 工作 生活 早晨 晚上 花园 房间 国王 和平 河流",
    "ja": "の に は を た が で て と し れ さ ある いる も する から な こと として い や など なっ ない この ため その あっ よう "
    "また もの という あり まで られ なる へ か だ これ によって により おり より による ず なり られる において 時間 学校 先生 "
    "友達 歴史 言葉 科学 音楽 市場 空 太陽 月 海 山 道 子供 仕事 生活 朝 夜 庭 部屋 王様 平和 川 橋 村 本 水 家 花 木 鳥 馬 "
    "テレビ カメラ コンピューター ニュース テーブル ドア 新しい 古い 大きい 小さい 美しい 長い 速い 遠い 近い",
    "th": "ที่ และ ใน การ ของ เป็น มี ได้ จะ ไม่ ว่า ให้ กับ ไป มา แต่ ก็ จาก โดย นี้ หรือ คน ความ เรา เขา แล้ว อยู่ ต้อง "
    "เวลา โรงเรียน ครู เพื่อน ประวัติศาสตร์ ภาษา วิทยาศาสตร์ ดนตรี ตลาด ท้องฟ้า ดวงอาทิตย์ ดวงจันทร์ ทะเล ภูเขา ถนน เด็ก "
    "งาน ชีวิต เช้า กลางคืน สวน ห้อง พระราชา สันติภาพ แม่น้ำ สะพาน หมู่บ้าน หนังสือ น้ำ บ้าน ดอกไม้ ต้นไม้ นก ม้า ใหม่ เก่า "
    "ใหญ่ เล็ก สวย ยาว เร็ว ไกล ใกล้ ง่าย ยาก ประเทศ เมือง อาหาร ข้าว",
}
SPACELESS = ("zh", "ja", "th")
_ENDS = {"zh": "\u3002", "ja": "\u3002", "th": " ", "hi": "\u0964 "}
KINDS = ("base64", "seo", "menu", "symbols", "mojibake", "lorem", "numbers", "lines", "gibberish", "cookies")
"""Of junk."""
OTHER_KINDS = (
    "hex dump",
    "city spam",
    "bar menu",
    "bullets",
    "german footer",
    "cp1251",
    "mojibake twice",
    "keys",
    "shop",
)
"""Of junk that no rule was written for: how far the rules reach beyond what they were made with."""
EDITED = 0.1
"""Share of the words that are others in an edited item."""


@dataclass
class Planted:
    """A corpus, and where everything is."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """In the order of the corpus."""
    unique: dict[str, str] = field(default_factory=dict)
    """Id -> language of clean documents that nothing was planted in."""
    junk: dict[str, str] = field(default_factory=dict)
    """Id -> kind."""
    near: list[tuple[str, str, str]] = field(default_factory=list)
    """(copy, original, language)."""
    items: dict[str, str] = field(default_factory=dict)
    """Evaluation item -> its language."""
    verbatim: dict[str, str] = field(default_factory=dict)
    """Id of a document -> the item that it holds as it is."""
    edited: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Id of a document -> the item that it holds edited, and that text."""
    quoting: dict[str, str] = field(default_factory=dict)
    """Id of a document -> the passage that it quotes, as one other document does."""


class Maker:
    """Makes the texts of one corpus.

    Args:
        seed: of everything.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._lexicons = {language: words.split() for language, words in LEXICONS.items()}

    def words(self, language: str, count: int) -> list[str]:
        """Return words of a language, the first of its lexicon more often."""
        lexicon = self._lexicons[language]
        return [lexicon[int(len(lexicon) * self.random.random() ** 1.5)] for _ in range(count)]

    def sentences(self, language: str, count: int) -> list[list[str]]:
        """Return sentences as words."""
        return [self.words(language, self.random.randrange(8, 19)) for _ in range(count)]

    def text(self, language: str, sentences: list[list[str]]) -> str:
        """Return sentences as text, a paragraph every five."""
        space = "" if language in SPACELESS else " "
        end = _ENDS.get(language, ". ")
        pieces = [space.join(words) + end for words in sentences]
        return "\n\n".join("".join(pieces[n : n + 5]).strip() for n in range(0, len(pieces), 5))

    def junk(self, kind: str) -> str:
        """Return a page of junk."""
        draw = self.random
        if kind == "base64":
            data = base64.b64encode(draw.randbytes(draw.randrange(400, 1500))).decode()
            return "Content-Transfer-Encoding: base64\n\n" + "\n".join(
                data[n : n + 76] for n in range(0, len(data), 76)
            )
        if kind == "seo":
            phrase = " ".join(self.words("en", 2))
            return " ".join(
                f"{draw.choice(('best', 'cheap', 'buy'))} {phrase} {self.words('en', 1)[0]}" for _ in range(60)
            )
        if kind == "menu":
            return "\n".join(" ".join(self.words("en", draw.randrange(1, 3))).title() for _ in range(60))
        if kind == "symbols":
            return "\n".join("".join(draw.choices("#*=|~^<>{}[]+-_/\\", k=60)) for _ in range(12))
        if kind == "mojibake":
            text = (
                self.text("hi", self.sentences("hi", 4))
                if draw.random() < 0.5
                else "\u00e9t\u00e9 \u00fcber \u2019na\u00efve\u2019 " * 30
            )
            return f"{draw.random()} " + text.encode().decode("cp1252", errors="replace")
        if kind == "lorem":
            base_words = [
                "lorem",
                "ipsum",
                "dolor",
                "sit",
                "amet",
                "consectetur",
                "adipiscing",
                "elit",
                "sed",
                "do",
                "eiusmod",
                "tempor",
                "incididunt",
            ]
            return "Lorem ipsum " + " ".join(draw.choices(base_words, k=150)) + "."
        if kind == "numbers":
            return "\n".join("\t".join(str(draw.randrange(10**6)) for _ in range(8)) for _ in range(25))
        if kind == "lines":
            line = " ".join(self.words("en", 9))
            return "\n".join([line] * 20 + [" ".join(self.words("en", 9)) for _ in range(6)])
        if kind == "gibberish":
            letters = "bcdfghjklmnpqrstvwxzbcdfghjklmnpqrstvwxzaeiouy"
            return " ".join("".join(draw.choices(letters, k=draw.randrange(3, 12))) for _ in range(150))
        notice = ["We use cookies on this site.", "Read our privacy policy and terms of use.", "All rights reserved."]
        return "\n".join(f"{draw.choice(notice)} {' '.join(self.words('en', 2))}" for _ in range(25))

    def other_junk(self, kind: str) -> str:
        """Return a page of junk of `OTHER_KINDS`."""
        draw, topic = self.random, " ".join(self.words("en", 2))
        names = [word.title() for word in self.words("en", 40)]
        match kind:
            case "hex dump":
                return "\n".join(f"{n * 16:08x}  {draw.randbytes(16).hex(' ')}" for n in range(40))
            case "city spam":
                return " ".join(
                    f"Looking for {topic} in {name}? Our {topic} experts in {name} offer {topic} at low prices. Call now!"
                    for name in names[:12]
                )
            case "bar menu":
                return "\n".join(" | ".join(draw.sample(names, 8)) for _ in range(8))
            case "bullets":
                return "\n".join(f"* {name} {draw.choice(names)} ({draw.randrange(99)})" for name in names)
            case "german footer":
                words = ("Datenschutz", "Impressum", "AGB", "Kontakt", "Widerruf", "Cookies", "Newsletter", "Versand")
                return "\n".join(
                    "\u00a9 Alle Rechte vorbehalten. " + " \u00b7 ".join(draw.sample(words, 6)) for _ in range(8)
                )
            case "cp1251":
                latin = "i v ne na ya byt on s chto eto dom vremya god den ruka"
                russian = "".join(chr(0x430 + ord(letter) - ord("a")) if letter != " " else " " for letter in latin)
                return (" ".join(draw.choices(russian.split(), k=200)) + ".").encode("cp1251").decode("latin-1")
            case "mojibake twice":
                text = self.text("de", self.sentences("de", 8)).replace("a", "\u00e4").replace("u", "\u00fc")
                return text.encode().decode("latin-1").encode().decode("latin-1")
            case "keys":
                return " ".join("".join(draw.choices("asdfjkl;asdfghjkl", k=draw.randrange(2, 9))) for _ in range(160))
        return "\n".join(
            f"{name} SKU-{draw.randrange(10**5)} ${draw.randrange(99)}.99 In stock Add to cart" for name in names
        )

    def changed(self, words: list[str], language: str, share: float) -> list[str]:
        """Return words of which a share, at least one, is another word."""
        result = list(words)
        for place in self.random.sample(range(len(words)), max(round(share * len(words)), 1)):
            result[place] = next(word for word in self.words(language, 50) if word != words[place])
        return result


def make(size: int, seed: int = 0) -> Planted:
    """Return a corpus of `size` documents: 15 % junk, 10 % near-duplicates, 5 % with items, 4 % with passages.

    Args:
        size: documents, at least 200.
        seed: of everything.
    """
    maker, planted = Maker(seed), Planted()
    languages = list(LEXICONS)
    for number in range(size * 15 // 100):
        kind = KINDS[number % len(KINDS)]
        _add(planted, f"junk-{number}", maker.junk(kind), "web")
        planted.junk[f"junk-{number}"] = kind
    for number in range(size * 10 // 100):
        language = languages[number % len(languages)]
        sentences = maker.sentences(language, 14)
        _add(planted, f"original-{number}", maker.text(language, sentences), language)
        share = (0.02, 0.04, 0.06)[number % 3]
        flat = maker.changed([word for sentence in sentences for word in sentence], language, share)
        copy = [[flat.pop(0) for _ in sentence] for sentence in sentences]
        _add(planted, f"copy-{number}", maker.text(language, copy), language)
        planted.near.append((f"copy-{number}", f"original-{number}", language))
    for number in range(size * 5 // 100):
        _plant_item(maker, planted, number, languages[number % len(languages)])
    for number in range(size * 2 // 100):
        language = languages[number % len(languages)]
        passage = maker.sentences(language, 2)
        for side in "ab":
            sentences = maker.sentences(language, 10)
            sentences[4:4] = passage
            _add(planted, f"quoting-{number}{side}", maker.text(language, sentences), language)
            planted.quoting[f"quoting-{number}{side}"] = maker.text(language, passage).strip()
    for number in range(size - len(planted.records)):
        language = languages[number % len(languages)]
        text = maker.text(language, maker.sentences(language, maker.random.randrange(8, 30)))
        _add(planted, f"unique-{number}", text, "web" if number % 3 == 0 else language)
        planted.unique[f"unique-{number}"] = language
    maker.random.shuffle(planted.records)
    return planted


def _plant_item(maker: Maker, planted: Planted, number: int, language: str) -> None:
    """Add a document that holds an item, verbatim or edited, short or long."""
    short = number % 4 < 2
    words = maker.words(language, maker.random.randrange(8, 11) if short else maker.random.randrange(20, 45))
    item = maker.text(language, [words]).strip()
    planted.items[item] = language
    sentences = maker.sentences(language, 10)
    if number % 2:
        sentences[5] = words
        planted.verbatim[f"item-{number}"] = item
    else:
        sentences[5] = maker.changed(words, language, EDITED)
        planted.edited[f"item-{number}"] = item, maker.text(language, [sentences[5]]).strip()
    _add(planted, f"item-{number}", maker.text(language, sentences), language)


def _add(planted: Planted, name: str, text: str, source: str) -> None:
    planted.records.append({"id": name, "text": text, "source": source, "license": "CC0-1.0"})
