// Guidance: a request becomes branches (rows of the network) whose weights sum to 1.
//
// The mirror of `stylemuse.decoding.guidance` for one style at full weight and a constant ramp. A(t) is the network with
// the style on prompt t, B(t) the base:
//
//   CFG        A(t) + (scale - 1) (A(t) - A(""))
//   StyleDrop  A(t) + style (A(t) - B(t)) + text (B(t) - B(""))

const NEGLIGIBLE = 1e-9;
const STYLEDROP = {recipe: "StyleDrop", style: 2, text: 5};
const CFG = {recipe: "CFG", scale: 10};
const RECIPES = {StyleDrop: STYLEDROP, CFG};

/**
 * What a style recommends, or the model where there is none, as {recipe, ...numbers}.
 * `wanted` replaces numbers of StyleDrop: the push towards the style and towards the prompt.
 */
export function guidanceOf(style, defaults, wanted = {}) {
  const facts = style?.recommended ?? {};
  const fallback = style ? STYLEDROP : {recipe: "CFG", scale: defaults.scale ?? CFG.scale};
  const own = facts.guidance === undefined ? fallback : recommended(facts);
  const replaced = Object.entries(wanted).filter(([, value]) => value !== undefined);
  if (!replaced.length) return own;
  return {...STYLEDROP, ...(own.recipe === "StyleDrop" ? own : {}), ...Object.fromEntries(replaced)};
}

function recommended(facts) {
  const recipe = RECIPES[facts.guidance];
  if (!recipe) throw new Error(`guidance '${facts.guidance}' is unknown; allowed are ${Object.keys(RECIPES).join(", ")}`);
  return Object.fromEntries(Object.entries(recipe).map(([name, value]) => [name, facts[name] ?? value]));
}

/** Branches {prompt, styled, weight} of a prompt, with a style or without; equal ones are one, those of no weight gone. */
export function branches(prompt, styled, guidance) {
  const terms = [[prompt, styled, 1], ...guided(prompt, styled, guidance)];
  const sums = new Map();
  for (const [text, adapted, weight] of terms) {
    const key = JSON.stringify([text, adapted]);
    sums.set(key, {prompt: text, styled: adapted, weight: (sums.get(key)?.weight ?? 0) + weight});
  }
  return [...sums.values()].filter(branch => Math.abs(branch.weight) > NEGLIGIBLE);
}

/** The guidance of a recipe, as terms whose weights sum to 0. */
function guided(prompt, styled, {recipe, scale, style, text}) {
  const numbers = recipe === "CFG" ? {scale} : {style, text};
  for (const [name, number] of Object.entries(numbers)) {
    if (!(Number.isFinite(number) && number >= 0)) {
      throw new Error(`${recipe} ${name} ${number} is not allowed: a finite number, at least 0`);
    }
  }
  if (recipe === "CFG") {
    const extra = Math.max(scale - 1, 0);
    return [[prompt, styled, extra], ["", styled, -extra]];
  }
  return [[prompt, styled, style], [prompt, false, text - style], ["", false, -text]];
}
