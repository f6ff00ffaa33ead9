"""More ways to ask, for training: of ``(a|b|)`` any one is said. None is a held-out wording, or one but for a word."""

import re
from random import Random

CHOICE = re.compile(r"\(([^()]*)\)")
AS_TYPED = 0.25  # share without a capital at the beginning, and share without a mark at the end


def drawn(phrase: str, rng: Random) -> str:
    """One thing that a phrase says, as people write: mostly with a capital and a mark at the end."""
    text = " ".join(CHOICE.sub(lambda found: rng.choice(found[1].split("|")), phrase).split())
    text = text.rstrip(".?") if rng.random() < AS_TYPED else text
    return text if rng.random() < AS_TYPED else text[0].upper() + text[1:]


_SOUND = "(audio|recording|clip|speech|file|sound|voice message|sample|track|talk|utterance)"
_CLIP = f"(this|the|my|that) {_SOUND}"
_HERE = "(here|there|in this clip|in the recording|in this audio|in the file)"
_WHO = "(the speaker|this speaker|the person|this person|the voice|somebody|someone)"
_ASK = "(|please |can you |could you |now |just |kindly |i want you to |you should )"
_TELL = "(tell me|find out|let me know|state|determine|report|i want to know|i would like to know|work out)"
_NAME = "(name|identify|detect|recognise|recognize|classify|give|tell|state|find|label|guess|report)"

TRANSCRIBE = (
    f"{_ASK}transcribe {_CLIP}(| for me| exactly| completely| word by word| in full).",
    f"{_ASK}(write|type|note|put|set|jot) down (all that|everything that|exactly what|what) (is|was) said {_HERE}.",
    f"{_ASK}(write|type|spell) out (the|all|all the|the exact) (words|sentences) (of|in|from) {_CLIP}.",
    f"{_ASK}(type|note|put down) (what|everything) (the speaker|this person|he or she) (says|said) {_HERE}.",
    f"{_ASK}(turn|convert|change|bring|make) {_CLIP} (to|into) (text|words|writing|written words|a text).",
    f"{_ASK}(give|send|show|write|make|provide|produce|create) (me |us |)(a|the|an exact|a full) "
    f"(transcript|transcription) of {_CLIP}.",
    f"what (is|was) (said|spoken|uttered) in {_CLIP}?",
    f"(what|which) (words|sentences) (are|were) (said|spoken|uttered|heard) {_HERE}?",
    "(what|which words) (did|does) (he|she|this person|the voice|somebody) (say|speak|utter)?",
    f"what (can|do|could|did) (you|i|we|people|one) hear in {_CLIP}?",
    f"{_ASK}(give|read|repeat|show|write) (me |us |)(the words|all words|exactly the words) (of|in) {_CLIP}.",
    f"{_ASK}(repeat|write|type|note) (exactly |word by word |precisely |)what (is|was|has been) (said|spoken).",
    f"i (need|want|would like) (the words|the text|a transcript|the wording) (of|for) {_CLIP}.",
    "(dictation|transcription|transcript|speech recognition|the words|the text|as text|in writing|in words)(| please).",
    f"{_ASK}(listen|listen closely|listen carefully) and (write|type|note) it down(| word by word| exactly).",
    "how is (this|it|that) (written|spelled) in (words|text)?",
)

TRANSLATE = (
    f"{_ASK}translate {_CLIP} (to|into) LANG(| for me| exactly).",
    f"{_ASK}(turn|convert|change|bring|put) {_CLIP} (to|into) LANG.",
    "what (is|was) (said|spoken) (here|there), (translated to|put into|translated into|in) LANG?",
    f"{_ASK}(give|send|show|write|make|provide|produce) (me |us |)(a|the) translation of {_CLIP} (to|into) LANG.",
    f"{_ASK}(write|note|type|put) down in LANG what (the speaker|he or she|the voice) (says|said) {_HERE}.",
    f"{_ASK}(write|say|repeat) (this|it|that|what you hear) in LANG.",
    f"i (need|want|would like) the (LANG words|LANG text|LANG translation) (of|for) {_CLIP}.",
    "(in|to|into) LANG(| please).",
    "how (is this said|does one say this|do you say that|do they say it|can i say this) in LANG?",
    "what (does|did) (he|she|this person|the voice) say(| here), in LANG?",
    f"{_ASK}interpret {_CLIP} (to|into) LANG.",
)

TRANSCRIBE_TIMES = (
    f"{_ASK}transcribe {_CLIP} with (times|time stamps|timestamps|time marks|timings|the times).",
    f"{_ASK}(write|type|note) down what is said (with times|with the times|and at what time|with timestamps).",
    f"{_ASK}(give|show|write|make|produce) (me |)(a|the) transcript (with|including) (times|timestamps|timings).",
    "(which|what) words are (said|spoken) at (which time|what time|which second)?",
    f"{_ASK}(make|write|produce|create) (subtitles|captions|timed text|timed captions) (for|of) {_CLIP}.",
    "(subtitles|timed transcript|text with times|transcript with timestamps|words and times)(| please).",
)

DIARIZE = (
    f"{_ASK}(tell me|write down|say|note|list) who says what(| and when| in this audio| here| with times).",
    f"{_ASK}(transcribe|diarize|write down) (this|the) (conversation|dialogue|talk|discussion|meeting) with "
    "(the speakers|speakers|speaker labels|speaker names|speakers and times).",
    f"who (said|says|is saying) what {_HERE}?",
    f"{_ASK}(give|show|make|produce) (me |)(a|the) transcript with (all|all the|the) speakers.",
    "(what|which words) does (each|every) (speaker|person|one|voice) say(| and when)?",
    f"{_ASK}(separate|split|divide) {_CLIP} by (speaker|speakers|person) and transcribe (it|them|all).",
)

TURNS = (
    f"{_ASK}(tell me|write down|note|show) who (speaks|talks|is speaking|is talking) when(| without words).",
    "(who|which speaker|which person|which voice) (speaks|talks|is talking) (when|at what time|at which times)?",
    f"{_ASK}(give|show|list|mark|find) (me |)(all |)(the speaker turns|the turns)(| with times).",
    f"{_ASK}(segment|split|divide|cut) {_CLIP} (by|into) (speakers|speaker turns|turns) without words.",
    f"{_ASK}diarize {_CLIP} (without text|without words|with times only).",
)

EMOTION = (
    f"{_ASK}{_NAME} the (emotion|mood|feeling|emotional state) (of|in) (this|the) (voice|speech|recording|clip).",
    f"(what|which) (emotion|mood|feeling) (is|do you hear|can you hear|is heard|is expressed) {_HERE}?",
    "how do you think (the voice|the person|the speaker|this speaker) feels(| here)?",
    "how does (the voice|this voice|the person|the speaker|this speaker) sound(| here| to you)?",
    f"{_TELL} (what|which) (emotion|mood|feeling) (the speaker|this person|the voice) (has|shows|expresses).",
    f"{_TELL} how (the speaker|this speaker|the voice|this person) (feels|is feeling|sounds).",
    "(emotion|mood|feeling|speaker emotion|emotion of the voice|emotion recognition)(| please)?",
    "in (what|which) (emotion|emotional state) is (the speaker|this person|the voice)?",
)

IS_EMOTION = (
    "is (he or she|the person here|the one who speaks|the voice you hear) {}?",
    "does (he or she|the person here|the one who speaks|the voice you hear) (sound|feel|seem) {}?",
    f"{_TELL} (if|whether) {_WHO} (is|sounds|feels) {{}}.",
    "do you (say|think|hear|believe) that (the voice|the person|the speaker|he or she) (is|sounds|feels) {}?",
    "is (this|that) (someone|somebody|a speaker|a person) who is {}?",
    "is (the speaker|this person|the voice|he or she) {} or not?",
    "{}, (yes or no|is that so|is the speaker so|right or wrong)?",
)

LANGUAGE = (
    f"{_ASK}{_NAME} the (language|spoken language) (of|in) {_CLIP}.",
    f"(what|which) language (is|do you hear|can you hear|is spoken|is used) {_HERE}?",
    f"(what|which) language (does|did) {_WHO} (speak|use)?",
    f"{_TELL} (what|which) language (this is|it is|is spoken|they speak|the speaker uses) {_HERE}.",
    f"{_TELL} (what|which) language {_WHO} speaks.",
    f"in (what|which) language (is|was) {_CLIP}?",
    "(language|spoken language|language identification|language of the speaker|name of the language)(| please)?",
    f"i (need|want) the (name of the |)language of {_CLIP}.",
)

ACTIVITY = (
    f"{_ASK}(find|mark|list|show|give|detect|locate) (me |)(all |)(the speech|stretches with speech|parts with voice).",
    "(when|at what time|at which times) (is there|can you hear|do you hear) (speech|a voice|talking|someone|voices)?",
    f"{_TELL} when (someone|somebody|anyone) (speaks|is speaking|talks).",
    "(speech detection|voice activity|speech times|times of speech|voice detection|speech segments)(| please).",
    f"{_ASK}(separate|tell|split) (speech|voice|talking) from (silence|noise|the rest).",
)

INTENT = (
    "what (does|did) (the speaker|the user|he or she|the customer) (want|order|wish|need|ask for)(| here)?",
    f"{_ASK}{_NAME} the (intent|intent and slots|intention|command|request|order) (of|in) {_CLIP}.",
    f"{_ASK}(extract|parse|get|read|fill) (the |)(intent and slots|intent|slots|command|request) (of|from|in) {_CLIP}.",
    f"{_TELL} what (the speaker|the user|the customer|this person) (wants|asks for|orders|wishes).",
    "(intent|intent and slots|slots|command|meaning of the command|semantic parse)(| please)?",
    "(what|which) (order|command|request|intent) is (this|that|spoken here|given here)?",
)

GENDER = (
    f"{_ASK}{_NAME} the gender of (the|this) (speaker|voice|person).",
    "(is|was) (the|this) (speaker|person|voice) (a man or a woman|a woman or a man|male or female|female or male)?",
    f"{_TELL} (if|whether) (the speaker|the voice) is (male or female|female or male|a man or a woman).",
    f"(what|which) gender does {_WHO} have?",
    f"(what|which) gender is {_WHO}?",
    "(gender|speaker gender|gender of the voice|woman or man|female or male|a man or a woman)(| please)?",
    "who is (speaking|talking) here, (a man or a woman|a woman or a man)?",
)

ACCENT = (
    f"{_ASK}{_NAME} the accent (of|in) (the|this) (speaker|voice|person|speech|recording|clip).",
    f"(what|which) accent (is|do you hear|can you hear|is heard|is spoken) {_HERE}?",
    f"(what|which) accent (does|did) {_WHO} (have|speak with|use)?",
    f"{_TELL} (what|which) accent (this is|it is|they have|the speaker has).",
    "(accent|speaker accent|kind of English|accent of the voice)(| please)?",
)

SPEAKERS = (
    f"{_ASK}count (all the|the) (speakers|voices|people|talkers) (in this audio|in the recording|that you hear).",
    f"how many (people|persons|speakers|voices|talkers) (are there|can you hear|do you hear|are heard) {_HERE}?",
    f"{_TELL} how many (people|persons|speakers|voices) (there are|are speaking|talk|can be heard).",
    "(number of voices|speaker count|count of speakers|how many speakers|how many people)(| please)?",
    f"{_ASK}(give|find|tell me) (the |)(number|count) of (people|persons|speakers|voices) in {_CLIP}.",
)

SPOKEN_WORD = (  # a quotation mark that may be the end of what is typed is the end of the phrase
    f'{_TELL} (if|whether) (the word |)"{{}}" (is|was) (said|spoken|heard|mentioned|uttered).',
    '(is|was) (the word |)"{}" (said|spoken|heard|mentioned|uttered)(| here| or not| in this clip)?',
    '(do|did|can|could) (you|we) hear (the word |anyone say |somebody say |)"{}"?',
    '(does|did) (he or she|the person|the voice|someone) (say|mention|use|utter) (the word |)"{}"?',
    f'{_ASK}(look|listen|search|check) for (the word |)"{{}}" {_HERE}.',
    'is there (the word|the spoken word) "{}" (in it|in this clip|here)?',
)

TRANSLATE_TEXT = (
    f"{_ASK}translate this (text|sentence|line) (to|into) LANG: {{}}",
    "(to|into|in) LANG(|, please): {}",
    f"{_ASK}(say|write|put|give) (the following|the sentence|the text|it) in LANG: {{}}",
    "(how is|how do i say|how would you say|what is) (this|the following) in LANG: {}",
    "(LANG translation|translation to LANG|translation into LANG|same in LANG): {}",
)

NEXT_TEXT = (
    f"{_ASK}(continue|complete|finish|end|go on with) (this|the|my) (text|sentence|line|phrase|story): {{}}",
    "what (comes|follows) (next|now|after it|then): {}",
    "how (does|will|would) (this|it|the text|the sentence) (go on|end|continue): {}",
)
