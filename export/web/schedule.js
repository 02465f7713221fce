// How many positions stay masked after each decoding step, and how random each step is: aMUSEd's schedule.
//
// The mirror of `stylemuse.decoding.schedule.amused` on an empty grid, in its precision: what is fp32 there is rounded
// to fp32 here, and the cosine once, from a double.

const TEMPERATURES = [2, 0];

/**
 * The numbers of every step of a grid of `tokens`, as manifest.json tells them for the default number of steps.
 *
 *   still masked        max(1, min(n - 1, floor(tokens cos(pi r / 2)))), n masked before; 0 after the last; r = (k + 1) / T
 *   token temperature   1
 *   choice temperature  from 2 down to 0
 */
export function amused(tokens, steps) {
  const maskedAfter = [];
  for (let step = 1, masked = tokens; step < steps; step++) {
    masked = Math.max(1, Math.min(masked - 1, Math.floor(Math.fround(tokens * quarterCosine(step, steps)))));
    maskedAfter.push(masked);
  }
  maskedAfter.push(0);
  return {
    maskedAfter,
    tokenTemperature: Array(steps).fill(1),
    choiceTemperature: line(...TEMPERATURES, steps),
    rawLogit: false,
  };
}

function quarterCosine(step, steps) {
  const ratio = Math.fround(step / steps);
  return Math.fround(Math.cos(Math.fround(Math.fround(ratio * Math.fround(Math.PI)) / 2)));
}

/** Evenly spaced fp32 numbers, each rounded once, counted from the nearer end. */
function line(first, last, steps) {
  const stride = Math.fround((last - first) / Math.max(steps - 1, 1));
  return Array.from({length: steps}, (_, index) =>
    Math.fround(index < Math.max(steps >> 1, 1) ? first + stride * index : last - stride * (steps - 1 - index)));
}
