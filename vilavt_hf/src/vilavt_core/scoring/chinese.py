"""What Chinese writes otherwise: full-width characters, no blanks between words, its own marks, units and numerals."""

from __future__ import annotations

import re

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
"""Chinese characters, as part of a character class."""

_SIMPLIFIED = str.maketrans(
    "應該當終後確選項擇為負無沒錯誤對總綜約個還與認覺鐘時週碼歐鎊華攝圓結論斷會",
    "应该当终后确选项择为负无没错误对总综约个还与认觉钟时周码欧镑华摄圆结论断会",
)
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0xFFE5: "¥"}
_MARKS = str.maketrans({"。": ". ", "｡": ". ", "【": "[", "】": "]", "〔": "[", "〕": "]", "〖": "[", "〗": "]"})
_OPTION_COMMA = re.compile(r"(?<![A-Za-z0-9])([A-Za-z])、(?!\s?[A-Za-z](?![A-Za-z]))")
_BORDER = re.compile(rf"(?<=[{HAN}])(?=[A-Za-z0-9+$€£¥.-])|(?<=[A-Za-z0-9%°²³])(?=[{HAN}])")

_UNITS = {
    "m": "米 公尺",
    "cm": "厘米 公分",
    "mm": "毫米 公釐",
    "km": "千米 公里",
    "ft": "英尺 英呎",
    "in": "英寸 英吋",
    "yd": "码",
    "mi": "英里 英哩",
    "s": "秒 秒钟",
    "min": "分钟",
    "h": "小时 个小时",
    "day": "天",
    "week": "周 星期 个星期",
    "month": "个月",
    "year": "年",
    "°": "度",
    "°C": "摄氏度",
    "°F": "华氏度",
    "g": "克",
    "kg": "千克 公斤",
    "lb": "磅",
    "oz": "盎司",
    "l": "升",
    "ml": "毫升",
    "px": "像素 画素 畫素",
    "$": "美元 美金",
    "€": "欧元",
    "£": "英镑",
    "¥": "元 圆 人民币 人民幣 日元 日圆",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_NAME = "|".join(sorted(_UNIT_OF, key=len, reverse=True))
_UNIT = re.compile(rf"(?<=\d)\s?(?P<power>平方|立方)?(?P<name>{_NAME})(?:\s?[/每]\s?(?P<per>{_NAME}))?")
_SPELLINGS = (
    (re.compile(r"百分之\s?(-?\d+(?:\.\d+)?)"), r"\1%"),
    (re.compile(r"(\d+)\s?分之\s?(\d+)"), r"\2/\1"),
    (re.compile(r"(\d+)\s?又\s?(\d+\s?/\s?\d+)"), r"\1 \2"),
    (re.compile(r"零下\s?(?=\d)|负\s?(?=[\d.¥$€£])"), "-"),
    # numerals that belong to words which count nothing
    (re.compile(r"[一共总]+(?:共|计)|万一|统一|唯一|一样|一般|一定|一些|一直"), " "),
)


def simplified(text: str) -> str:
    """Text whose traditional characters, of words that are read here, are simplified in their place: ``選`` is ``选``.

    Other characters stay: this reads letters, numbers and judgments, and compares no texts.
    """
    return text.translate(_SIMPLIFIED)


def half_width(text: str) -> str:
    """Full-width letters, digits and signs as the ordinary ones: ``Ｂ．`` is ``B.``; everything else as it is."""
    return text.translate(_WIDE)


def spaced(text: str) -> str:
    """Text whose Chinese marks are ordinary ones, with a blank wherever Chinese and Latin characters or digits meet.

    ``、`` after a lone letter sets it off as an option's (``B、左边`` is ``B. 左边``); elsewhere it is a comma.
    """
    text = _OPTION_COMMA.sub(r"\1. ", half_width(text).translate(_MARKS)).replace("、", ", ")
    return _BORDER.sub(" ", text)


def plain_number_words(text: str) -> str:
    """Text with symbols for Chinese units after digits; ``百分之50`` is ``50%``, ``负3`` is ``-3``."""
    text = simplified(half_width(text))
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    return spaced(_UNIT.sub(_symbol, text))


def _symbol(match: re.Match[str]) -> str:
    power = {"平方": "^2", "立方": "^3", None: ""}[match["power"]]
    per = f"/{_UNIT_OF[match['per']]}" if match["per"] else ""
    return f" {_UNIT_OF[match['name']]}{power}{per} "
