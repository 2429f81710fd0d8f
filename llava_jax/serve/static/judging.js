// What is thought of an answer: good, bad, or a better text. What can be learned from it: see `learnable` and `pairs`.

export const [GOOD, BAD] = ["good", "bad"];

/** What an answer says: the better text that was written for it, if there is one. */
export const said = ({ text, better }) => better ?? text;

const isGood = ({ rating, better }) => better !== undefined || rating === GOOD;
const isBad = ({ rating, better }) => better === undefined && rating === BAD;
export const isJudged = (answer) => isGood(answer) || isBad(answer);

/** An answer without what is not kept when another one takes its place. */
export const asOther = ({ text, rating, better, model }) => ({ text, rating, better, model });

/** The judged answers to a question, the one that is shown first. */
const judgedAnswers = (message) => (message.parts ? [] : [message, ...(message.others ?? [])].filter(isJudged));

/** The messages that training should learn: up to the first bad answer, and of these up to the last good one. */
export function learnable(messages) {
  const bad = messages.findIndex((message) => !message.parts && isBad(message));
  const before = messages.slice(0, bad < 0 ? undefined : bad);
  return before.slice(0, before.findLastIndex((message) => !message.parts && isGood(message)) + 1);
}

/** Better and worse answers to one question: {messages, chosen, rejected}, `messages` up to the question. */
export function pairs(messages) {
  return messages.flatMap((message, i) => {
    const answers = judgedAnswers(message);
    const best = answers.find(({ better }) => better !== undefined) ?? answers.find(isGood);
    const worse = answers.filter(({ rating, better }) => better !== undefined || rating === BAD);
    const other = ({ text }) => text !== said(best);
    const made = ({ text }) => ({ messages: messages.slice(0, i), chosen: said(best), rejected: text });
    return best ? worse.filter(other).map(made) : [];
  });
}

/** The number of questions whose answers were judged, but none is better than another. */
export function unpaired(messages) {
  const paired = new Set(pairs(messages).map((pair) => pair.messages.length));
  return messages.filter((message, i) => judgedAnswers(message).length && !paired.has(i)).length;
}
