"""From the token ids of a completion to its text: whole, as it is graded, and token by token."""

import os

CONTEXT = 8  # tokens; a character has at most four


def decode(tokenizer, rollout):
    """The text of each completion of the rollout, up to its EOS."""
    lengths = rollout.mask.sum(1) - (~rollout.truncated).long()  # without EOS
    rows = zip(rollout.completions.tolist(), lengths.tolist(), strict=True)
    return [text_of(tokenizer, ids[:n]) for ids, n in rows]


def text_of(tokenizer, ids):
    """The text of these tokens, without BOS and padding.

    Other special tokens stay: a model may have been taught to write `####` or `<think>` as one.
    """
    silent = (tokenizer.bos_token_id, tokenizer.pad_token_id)
    ids = [token for token in ids if token not in silent]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def token_texts(tokenizer, ids, ended):
    """What each token of a completion adds to its text: a list of len(ids) texts.

    ended: the last token is an EOS, whose text is its own. The others, joined, are `text_of` the
    tokens before it. Decoded alone, a word would lose the space before it, and a part of a
    character its bytes: such a character is given to its last token.

    A token is decoded after the CONTEXT tokens before it. After all of them, the time would grow
    with the square of the length; that is only done where the context is not enough.
    """
    if ended:
        return [*token_texts(tokenizer, ids[:-1], False), tokenizer.decode(ids[-1:])]
    text = text_of(tokenizer, ids)
    found, told = [], 0  # text[:told] is found
    start = middle = place = known = 0  # ids[:place] is text[:known]
    before = ""  # the text of ids[start:place]
    for stop in range(1, len(ids) + 1):
        if stop - place > CONTEXT:
            start, middle, place, known, before = 0, 0, 0, 0, ""
        window = text_of(tokenizer, ids[start:stop])
        new = window[len(before) :]
        same = len(os.path.commonprefix([new, text[known : known + len(new)]]))
        found.append(text[told : known + same])
        told = max(told, known + same)
        if same == len(new):  # else a character is not complete yet
            place, known, before = stop, known + same, window
            if stop - middle > CONTEXT:
                start, middle = middle, stop
                before = text_of(tokenizer, ids[start:stop])
    if told < len(text):
        found[-1] += text[told:]
    return found
