// CLIP's tokenizer, from the tokenizer.json of an exported folder: a prompt -> ids of one fixed length.
//
// The mirror of `stylemuse.models.tokenizer`: special tokens are found first; the rest is NFC, white space folded, lower
// case; split into words, single digits and runs of signs; the bytes of each piece merged by byte-pair encoding; framed
// by the start and the end token, cut or padded.

const BYTE_LEVEL = pattern(String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+`);
const SPACE = pattern("\\s+");
const NORMALIZERS = ["NFC", "Replace", "Lowercase"];
const SPLITTERS = ["Split", "ByteLevel"];

export class Tokenizer {
  /** `file` is the JSON of tokenizer.json; `length` is ids per prompt. Throws where it is of another kind than CLIP's. */
  constructor(file, length) {
    const kinds = list => (list ?? []).map(each => each.type).join();
    need(file.model?.type === "BPE" && file.model.end_of_word_suffix === "</w>", "its model");
    need(kinds(file.normalizer?.normalizers) === NORMALIZERS.join(), "its normalizer");
    need(kinds(file.pre_tokenizer?.pretokenizers) === SPLITTERS.join(), "its pre-tokenizer");
    need(!file.added_tokens.some(token => token.single_word || token.lstrip || token.rstrip), "a special token");
    this.length = length;
    this.piece = pattern(file.pre_tokenizer.pretokenizers[0].pattern.Regex);
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.unknown = this.vocabulary.get(file.model.unk_token);
    const pairs = file.model.merges.map(pair => (Array.isArray(pair) ? pair.join(" ") : pair));
    this.ranks = new Map(pairs.map((pair, rank) => [pair, rank]));
    this.raw = specials(file.added_tokens.filter(token => !token.normalized), text => text);
    this.normalized = specials(file.added_tokens.filter(token => token.normalized), normalize);
    this.pad = file.padding?.pad_id;
    need(Number.isInteger(this.pad), "its padding");
    [this.start, this.end] = frame(file.post_processor);
  }

  /** The ids of a prompt. */
  ids(prompt) {
    const inner = [];
    for (const [text, id] of parts(prompt, this.raw)) {
      if (id !== undefined) inner.push(id);
      else for (const [piece, special] of parts(normalize(text), this.normalized)) {
        if (special !== undefined) inner.push(special);
        else inner.push(...this.encode(piece));
      }
    }
    const ids = [this.start, ...inner.slice(0, this.length - 2), this.end];
    return [...ids, ...Array(this.length - ids.length).fill(this.pad)];
  }

  encode(text) {
    const words = (text.match(this.piece) ?? []).flatMap(piece => piece.match(BYTE_LEVEL) ?? []);
    return words.flatMap(word => this.merge(word).map(symbol => this.vocabulary.get(symbol) ?? this.unknown));
  }

  /** The pair of the lowest rank is joined, leftmost first, until none is left. */
  merge(word) {
    const symbols = [...new TextEncoder().encode(word)].map(byte => SIGNS[byte]);
    symbols.push(`${symbols.pop()}</w>`);
    for (;;) {
      let best = Infinity, place = -1;
      for (let index = 0; index + 1 < symbols.length; index++) {
        const rank = this.ranks.get(`${symbols[index]} ${symbols[index + 1]}`) ?? Infinity;
        if (rank < best) [best, place] = [rank, index];
      }
      if (place < 0) return symbols;
      symbols.splice(place, 2, symbols[place] + symbols[place + 1]);
    }
  }
}

/** A pattern of the tokenizers' library, where \s is Unicode's white space; here it would be another. */
function pattern(source) {
  return new RegExp(source.replaceAll("\\s", "\\p{White_Space}"), "gu");
}

/** Letter by letter: the end of a word changes no letter, as it would in toLowerCase of a whole text. */
function normalize(text) {
  return [...text.normalize("NFC").replace(SPACE, " ")].map(letter => letter.toLowerCase()).join("");
}

/** Special tokens by their text, the longer ones first, and what finds them. */
function specials(tokens, change) {
  const ids = new Map(tokens.map(token => [change(token.content), token.id]));
  const texts = [...ids.keys()].sort((one, other) => other.length - one.length);
  const escaped = texts.map(text => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return {ids, pattern: texts.length ? new RegExp(`(${escaped.join("|")})`, "gu") : null};
}

/** A text as [part, id of a special token or undefined] in order. */
function parts(text, {ids, pattern}) {
  const found = pattern ? text.split(pattern) : [text];
  return found.filter(part => part).map(part => [part, ids.get(part)]);
}

/** The ids of the start and the end token. */
function frame(processor) {
  if (processor?.type === "RobertaProcessing") return [processor.cls[1], processor.sep[1]];
  const single = (processor?.single ?? []).map(each => each.SpecialToken?.id);
  need(processor?.type === "TemplateProcessing" && single.length === 3, "its post-processor");
  return [single[0], single[2]].map(token => processor.special_tokens[token].ids[0]);
}

/** GPT-2's alphabet: each byte as a sign that can be printed. */
const SIGNS = (() => {
  const printable = byte => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  let next = 256;
  return Array.from({length: 256}, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
})();

function need(fine, what) {
  if (!fine) throw new Error(`tokenizer.json is not of CLIP's kind: ${what}`);
}
