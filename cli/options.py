"""Options of the verbs: those that several share, and those whose help is long. Each is a type that a parameter has."""

from pathlib import Path
from typing import Annotated

import typer

from ..spec import stored_weights

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress and no messages, only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show more details, on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder of Arriero's.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
ModelFolder = Annotated[Path, typer.Argument(help="Model folder that `arriero export` wrote; only read.")]
Folder = Annotated[Path, typer.Argument(help="Model or bundle folder, or a group of ranks.")]
Moved = Annotated[Path | None, typer.Option(help="Folder of the weight files, where they have moved.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Trust the engine in the bundle from now on: it is code, and was not built here."),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads, of all ranks of a group together.", show_default="the processors allowed")
]
Pages = Annotated[
    stored_weights.Pages,
    typer.Option(
        help="Weights that lie in huge pages, a copy of this process's own: auto, huge (all that every token reads) or "
        "file (none; processes share the file's)."
    ),
]
Samples = Annotated[int, typer.Option(help="Windows of text at most.")]
CalibrationSamples = Annotated[
    int | None, typer.Option(help="Windows of text at most.", show_default="by the model's size, at most 128")
]
CheckedSamples = Annotated[int | None, typer.Option(help="Windows of text at most.", show_default="24")]
CheckedWindow = Annotated[
    int | None, typer.Option(help="Tokens of a window.", show_default="two chunks and a quarter, at least 512")
]
MaxSeq = Annotated[
    int | None, typer.Option(help="Tokens that a sequence may hold.", show_default="the context, at most 16384")
]

# export
CopyWeights = Annotated[bool, typer.Option("--copy-weights", help="Copy the weights, so that the folder stands alone.")]
ConvertedType = Annotated[
    str | None, typer.Option(help="Convert the weights to float32, float16 or bfloat16.", show_default="as stored")
]
TensorParallel = Annotated[
    int, typer.Option(help="Ranks to split the model over, a folder each; 1 leaves all but the experts whole.")
]
ExpertParallel = Annotated[
    int | None, typer.Option(help="Groups of ranks over which the experts are distributed.", show_default="as --tp")
]
MovedSplit = Annotated[
    Path | None, typer.Option(help="Folder of a model's weight files, where they have moved; with --tp or --ep.")
]

Tokenizer = Annotated[
    Path | None,
    typer.Option(help="Folder to take tokenizer, chat template and preprocessor from.", show_default="CHECKPOINT"),
]
Draft = Annotated[
    Path | None, typer.Option(help="Folder of an EAGLE-3 head, which drafts tokens for the model to verify.")
]

# run, serve
DraftTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens at most that the model's draft guesses at a time, to be verified at once; 0 is none. The text "
        "stays the same.",
        show_default="5 where the model has a draft",
    ),
]

# calibrate
CalibrationData = Annotated[
    list[Path],
    typer.Option(
        help="File to calibrate on: text, or rows (.jsonl, .json, .parquet), as "
        '{"messages": [{"role": "user", "content": "What is this?"}, …], "images": ["photo.jpg"]}, '
        "paths relative to the file; may be repeated."
    ),
]
Activations = Annotated[
    str | None, typer.Option(help="static, or dynamic: a scale a token.", show_default="the recipe's")
]
Clip = Annotated[str | None, typer.Option(help="absmax, percentile, entropy or mse.", show_default="the recipe's")]
Percentile = Annotated[float | None, typer.Option(help="For --clip percentile, in percent.", show_default="99.99")]
Smoothing = Annotated[str | None, typer.Option(help="none, smoothquant or awq.", show_default="the recipe's")]
Strength = Annotated[float | None, typer.Option(help="Strength of the smoothing, 0 to 1.", show_default="searched")]
Rounding = Annotated[str | None, typer.Option(help="nearest or gptq.", show_default="the recipe's")]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Inputs that share a scale: 32, 64 or 128 of int4; 32 of int8, for CPUs.", show_default="64; all"
    ),
]
CalibratedCache = Annotated[str | None, typer.Option(help="int8 or fp8: quantise keys and values.")]
Override = Annotated[
    list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights, as 'layers.0.*=none'; may be repeated.")
]
CalibrationWindow = Annotated[
    int | None, typer.Option(help="Tokens of a window.", show_default="a chunk and a quarter, at least 512")
]
EachWeight = Annotated[
    bool, typer.Option("--verbose", help="Show more details, on stderr: each weight's errors, each phase's time.")
]
Floor = Annotated[int, typer.Option(help="Tokens that every expert must have seen.")]
FloorAction = Annotated[
    str,
    typer.Option(help="Where experts saw fewer: fail, keeping all layers; fallback: round them without statistics."),
]
AllExperts = Annotated[bool, typer.Option("--all-experts", help="Measure every expert over every token.")]
Device = Annotated[
    str, typer.Option(help="Where PyTorch computes: cpu, cuda, cuda:1, or auto: a GPU where it finds one.")
]

# build
Target = Annotated[
    str,
    typer.Option(help="cpu; tensorrt-rtx:sm89 (any GPU, or several; needs none); tensorrt (the GPU here)."),
]
MaxBatch = Annotated[int | None, typer.Option(help="Rows at once.", show_default="8")]
MaxPrefill = Annotated[int | None, typer.Option(help="Tokens of a prefill piece.", show_default="2048")]
MaxTiles = Annotated[
    int | None, typer.Option(help="Tiles of images that the vision tower takes at once.", show_default="17")
]
Gqa = Annotated[str | None, typer.Option(help="Attention by our plugin or TensorRT's own layers: plugin, native.")]
PlacedWeights = Annotated[
    str | None,
    typer.Option(help="Weights: all inside the engine; experts outside it; all outside.", show_default="experts"),
]
RoundedCache = Annotated[
    str | None,
    typer.Option(
        help="int8 or int4: round keys and values, with no calibration; cpu only.", show_default="16 bits or more"
    ),
]
Workspace = Annotated[int | None, typer.Option(help="MiB of scratch memory that a layer may use.")]
WeightStreaming = Annotated[
    bool, typer.Option("--weight-streaming", help="Let built-in weights stay in the host's memory.")
]
TimingCache = Annotated[Path | None, typer.Option(help="File of the timing cache; tensorrt only.")]
MovedModelWeights = Annotated[
    Path | None, typer.Option(help="Folder of the model's weight files, where they have moved.")
]

CopyBundleWeights = Annotated[
    bool,
    typer.Option(
        "--copy-weights", help="Copy the weights, so that the bundle stands alone, with a hash of each of its files."
    ),
]
RecordToken = Annotated[
    bool | None,
    typer.Option(
        "--record-token/--no-record-token",
        help="Record a greedy token for `doctor`: the bundle's own, for an engine the model's on the CPU.",
        show_default="for cpu, where memory allows",
    ),
]

# pack and doctor
PackedOutput = Annotated[Path, typer.Option("--output", "-o", help="File to write; with --unpack the folder.")]
Unpack = Annotated[bool, typer.Option("--unpack", help="Unpack a packed bundle, and prove each file by its hash.")]
ForcePacked = Annotated[
    bool, typer.Option("--force", help="Replace an existing packed bundle, or folder of Arriero's.")
]
Examined = Annotated[
    Path | None, typer.Argument(help="Bundle folder, or group of bundles.", show_default="this machine alone")
]
ExaminedSlots = Annotated[
    int | None, typer.Option(help="Sequences at once that memory is to last for.", show_default="16")
]

# inspect
Inspected = Annotated[
    Path, typer.Argument(help="Checkpoint, model, bundle, golden file, or a folder that check or bench wrote.")
]
Layers = Annotated[bool, typer.Option("--layers", help="List each fused layer of an engine with its sizes.")]
MemorySeq = Annotated[
    int | None,
    typer.Option(help="Tokens of a sequence to estimate memory for; CPU.", show_default="the context, at most 16384"),
]
MemoryBatch = Annotated[int, typer.Option(help="Rows at once to estimate memory for; CPU.")]

# run
Prompt = Annotated[str | None, typer.Option(help="Text to continue; - reads it from stdin.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help='JSONL of prompts, {"prompt": TEXT} or {"messages": LIST} a line, answered many at once.'),
]
Answers = Annotated[
    Path | None, typer.Option("--output", "-o", help="File for the answers to --prompts; a killed run goes on.")
]
ForceAnswers = Annotated[bool, typer.Option("--force", help="Replace an existing file of answers.")]
Image = Annotated[
    list[Path] | None,
    typer.Option(help="Image that the prompt is about, or that stands at its <|image|>; may be repeated."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Hold a conversation, one line a turn; /image FILE adds an image to the next.")
]
System = Annotated[str | None, typer.Option(help="System message of the conversation.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="New tokens at most.", show_default="the generation config's, else 512")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. As the next eight: default from the generation config.")
]
TopK = Annotated[
    int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all; 50 where nothing is said.")
]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest that make up this probability.")]
MinP = Annotated[float | None, typer.Option(help="Keep those with this share of the likeliest's.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="-2 to 2: above 0 discourages new tokens, the more often they occurred.")
]
PresencePenalty = Annotated[float | None, typer.Option(help="-2 to 2: above 0 discourages new tokens that occurred.")]
NoRepeatNgramSize = Annotated[int | None, typer.Option(help="No sequence of this many tokens comes twice; 0: any may.")]
MinNewTokens = Annotated[int | None, typer.Option(help="New tokens before one may end it.")]
TopLogprobs = Annotated[
    int | None,
    typer.Option(help="With --json: log-probabilities of the new tokens and of this many likeliest, 20 at most."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the random draws.")]
PromptLookup = Annotated[
    int,
    typer.Option(
        help="Tokens at most to guess from what followed the last ones before, and to verify at once. The text stays "
        "the same: on the CPU bit for bit, on a GPU but for ties within rounding."
    ),
]
StopString = Annotated[list[str] | None, typer.Option(help="Text that ends it; may be repeated.")]
EosTokenId = Annotated[list[int] | None, typer.Option(help="Token that ends it; may be repeated.")]
JsonSchema = Annotated[Path | None, typer.Option(help="File of a JSON schema that the text follows.")]
Grammar = Annotated[Path | None, typer.Option(help="File of a grammar in Lark that the text follows.")]
Regex = Annotated[str | None, typer.Option(help="Regular expression that the whole text matches.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Let no token end it.")]

# serve
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
UnixSocket = Annotated[Path | None, typer.Option(help="Socket file to listen on instead.")]
ModelName = Annotated[str | None, typer.Option(help="The model's name.", show_default="the folder's")]
Slots = Annotated[
    int | None, typer.Option(help="Sequences at once; more wait.", show_default="16, or an engine's limit")
]
PrefillBudget = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompts that a step reads while others decode.", show_default="32 or less, more in a burst"
    ),
]
PrefixBytes = Annotated[
    str | None,
    typer.Option(
        help="Keys and values of known beginnings to keep, as 256M; 0 keeps none.",
        show_default="a quarter of what is free, 256M at most",
    ),
]
SharePrefixes = Annotated[
    bool, typer.Option("--share-prefixes", help="Share known beginnings between callers of different keys.")
]
CacheBytes = Annotated[
    str | None,
    typer.Option(
        help="Keys and values of running sequences at most, as 8G: each takes what its length needs, and waits where "
        "there is none.",
        show_default="that of all slots, at most half of the free memory",
    ),
]
Queue = Annotated[int, typer.Option(help="Sequences that wait at most; beyond, clients get 429 with Retry-After.")]
ApiKeyFile = Annotated[Path | None, typer.Option(help="File of API keys, one a line.")]
OpenMetrics = Annotated[
    bool, typer.Option("--open-metrics", help="Ask for no key under /metrics, as routers and Prometheus read it.")
]
TlsCertificate = Annotated[Path | None, typer.Option(help="Certificate's file, in PEM, to speak TLS.")]
TlsKey = Annotated[Path | None, typer.Option(help="Its key's file.")]
CorsOrigin = Annotated[
    list[str] | None, typer.Option(help="Origin whose pages may ask, as https://example.org; may be repeated.")
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Name that a server on this machine's own address may be called by; may be repeated."),
]
AllowImageHost = Annotated[
    list[str] | None, typer.Option(help="Host that images may be fetched from; may be repeated.")
]
MaxBodyBytes = Annotated[str, typer.Option(help="Bytes of a request at most.")]
MaxBodiesBytes = Annotated[
    str,
    typer.Option(help="Bytes of all requests under way at most; long ones beyond get 429 with Retry-After."),
]
MaxPromptTokens = Annotated[int | None, typer.Option(help="Tokens of a prompt at most.", show_default="--max-seq")]
MostNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="New tokens of an answer at most.", show_default="--max-seq")
]
MaxImages = Annotated[int, typer.Option(help="Images of a request at most.")]
FirstTokenSeconds = Annotated[float, typer.Option(help="Seconds until the first token at most; 0 is no limit.")]
TotalSeconds = Annotated[float, typer.Option(help="Seconds of an answer at most; 0 is no limit.")]
DrainSeconds = Annotated[float, typer.Option(help="Seconds that running answers have to end after SIGTERM.")]
Dynamo = Annotated[
    bool, typer.Option("--dynamo", help="Be a worker of NVIDIA Dynamo, whose frontend speaks HTTP, instead.")
]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Log requests with what they say.")]

# bench
MeasuredFolder = Annotated[Path | None, typer.Argument(help="Model or bundle folder.", show_default=False)]
Url = Annotated[str | None, typer.Option(help="OpenAI server to measure under load, instead of a folder.")]
ServedModel = Annotated[
    str | None, typer.Option("--model", help="With --url: the model.", show_default="the first listed")
]
EndpointKind = Annotated[str, typer.Option("--endpoint", help="With --url: completions or chat.")]
SharedTokens = Annotated[
    int, typer.Option("--shared", help="With --url: tokens that all prompts begin with, before those of --prefill.")
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="With --url: file whose first line is an API key.")
]
BenchOutput = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.")]
Prefill = Annotated[
    str | None,
    typer.Option(help="Tokens of the prompts.", show_default="128,512,2048, as the context allows; 128 of a server"),
]
Batches = Annotated[
    str | None, typer.Option(help="Rows at once; of a server, clients.", show_default="1,4,8; 1,4,16,64 of a server")
]
DecodeTokens = Annotated[int, typer.Option(help="Tokens decoded after each prompt.")]
Runs = Annotated[int, typer.Option(help="Timed runs of each; medians are given.")]
ForceOutput = Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")]

# trend and compare
PAGE_START = b"<!doctype html>"
Page = Annotated[Path, typer.Option("--output", "-o", help="Page to write, an .html file.")]
ForcePage = Annotated[bool, typer.Option("--force", help="Replace an existing page.")]

# check and golden
Candidate = Annotated[Path, typer.Argument(help="Checkpoint, model or bundle to be judged.")]
Against = Annotated[Path, typer.Option(help="The reference: one of these too, or a golden file.")]
CheckedData = Annotated[
    list[Path] | None, typer.Option(help="Text, or rows as for calibrate; may be repeated. A golden file has its own.")
]
LimitsFile = Annotated[
    Path | None,
    typer.Option("--limits", help="TOML file of limits: a table for each recipe, as int8, and one called every."),
]
History = Annotated[Path | None, typer.Option(help="File to append a line of this run to; the report draws the trend.")]
CheckOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for verdict.json, junit.xml and report.html.")
]
Locate = Annotated[
    bool, typer.Option("--locate", help="Walk the layers: which one, which tensor or attribute is wrong first.")
]
MaxPerplexityRatio = Annotated[
    float | None, typer.Option(help="Perplexity over the reference's.", show_default="by format")
]
MaxKl = Annotated[float | None, typer.Option(help="Nats a token.", show_default="by format")]
MinTop1 = Annotated[
    float | None, typer.Option(help="Share of tokens with the same likeliest one.", show_default="by format")
]
MaxFlips = Annotated[float | None, typer.Option(help="Share of tokens that only one of them gets right.")]
MaxRouterFlips = Annotated[float | None, typer.Option(help="Share of choices of experts that differ.")]
MinGreedy = Annotated[float | None, typer.Option(help="Tokens generated alike, of 32.")]
CandidateWeights = Annotated[
    Path | None, typer.Option(help="Folder of the candidate's weight files, where they have moved.")
]
ReferenceWeights = Annotated[
    Path | None, typer.Option(help="Folder of the reference's weight files, where they have moved.")
]
ForceReport = Annotated[bool, typer.Option("--force", help="Replace an existing report.")]
CheckpointDevice = Annotated[
    str, typer.Option(help="Where PyTorch computes checkpoints: cpu, cuda, cuda:1, or auto: a GPU where it finds one.")
]
GoldenData = Annotated[list[Path], typer.Option(help="Text, or rows as for calibrate; may be repeated.")]
GoldenFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
ForceGolden = Annotated[bool, typer.Option("--force", help="Replace an existing golden file.")]
