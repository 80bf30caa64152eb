"""Draws a statement as HTML: running text in which each token has its value as colour and number."""

from html import escape

from tdlib.core.facts import token_name
from tdlib.views.html import direction_attribute, style
from tdlib.views.scale import BLACK, GREY, WHITE
from tdlib.views.sheet import Piece, Sheet, words_of


def statement_html(sheet: Sheet) -> str:
    """Draws the statement of a sheet; the ``title`` of a token says its numbers in words."""
    look = style(display="inline-block", white_space="nowrap", vertical_align="top", margin="0 2px 4px 0")
    # Blocks beside each other have no direction of their own, unlike letters: without these attributes the
    # words of a right-to-left text, and the pieces of each word, would stand in the opposite order.
    written = direction_attribute(sheet.record.text)
    of_word = ' dir="auto"' if written else ""
    words = [
        f"<span {look}{of_word}>{''.join(_piece(sheet, piece) for piece in word)}</span>"
        for word in words_of(sheet.record)
    ]
    return f"<div {style(line_height='1.35', font_size='16px')}{written}>{' '.join(words)}</div>"


def _piece(sheet: Sheet, piece: Piece) -> str:
    i = piece.token
    coloured = i is not None and bool(sheet.coloured[i])
    marked = i is not None and bool(sheet.marked[i])
    background, colour = sheet.scale.on_white(float(sheet.values[i])) if coloured else (WHITE, BLACK)
    if not coloured and (i is None or not sheet.record.distilled[i]):
        colour = GREY
    line = "dotted" if i is not None and sheet.dotted[i] else "solid"
    look = style(
        background_color=background,
        background_clip="padding-box",  # or a dark token would hide its dotted border
        color=colour,
        border_top=f"2px dotted {BLACK if i is not None and sheet.truth[i] else WHITE}",
        border_bottom=f"3px {line} {BLACK if marked else WHITE}",
        font_weight="bold" if marked else "normal",
        padding="0 1px",
    )
    note = "not a token of the student" if i is None else f"{token_name(sheet.record, i)}: {sheet.notes[i]}"
    objects = "".join(f"<small {style(color=GREY)}>[{number}]</small>" for number in piece.objects)
    number = sheet.scale.number(float(sheet.values[i])) if marked else "&nbsp;"
    place = "" if i is None else f' data-token="{i}"'
    return (
        f"<span {style(display='inline-block', text_align='center', vertical_align='top')}>"
        f'<span {look}{place} title="{escape(note)}">{escape(piece.text)}</span>{objects}'
        f"<br><span {style(font_size='11px', color=BLACK, padding='0 2px')}>{number}</span></span>"
    )
