// What the browser keeps of the conversation: its texts as one record, and each image under its id.

// Browsers can be told to keep nothing for a site; all of these throw then.
const attempt = (action) => {
  try {
    return action();
  } catch {
    return null;
  }
};

/** -> a setting that was kept in `localStorage` or `sessionStorage`, or null. */
export const recall = (name, storage = "localStorage") => attempt(() => window[storage].getItem(name));

/** Keeps a setting, or none if it is null. */
export function remember(name, value, storage = "localStorage") {
  attempt(() => (value === null ? window[storage].removeItem(name) : window[storage].setItem(name, value)));
}

/** The other tabs with this page. */
export const tabs = attempt(() => new BroadcastChannel("llava_jax")) ?? { postMessage() {} };

const STORES = ["conversation", "images"];
let opened;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = request.oncomplete = () => resolve(request.result);
    request.onerror = request.onabort = () => reject(request.error);
  });
}

async function begin(mode) {
  if (!opened) {
    const request = indexedDB.open("llava_jax", 1);
    request.onupgradeneeded = () => STORES.forEach((name) => request.result.createObjectStore(name));
    opened = done(request);
  }
  const transaction = (await opened).transaction(STORES, mode);
  return [transaction, ...STORES.map((name) => transaction.objectStore(name))];
}

const imagesOf = (messages) => messages.flatMap((m) => m.parts ?? []).flatMap((part) => part.image ?? []);

/** The conversation without what its images show. */
function textsOf({ system, messages }) {
  const bare = ({ text, image }) => (image ? { image: { id: image.id, name: image.name } } : { text });
  return { system, messages: messages.map((m) => (m.parts ? { ...m, parts: m.parts.map(bare) } : m)) };
}

const UNSAVED = "llava_jax.unsaved";

/** Keeps the texts at once, for a page that goes away: browsers drop what `save` has not finished then. */
export const saveTexts = (conversation) => remember(UNSAVED, JSON.stringify(textsOf(conversation)));

/** Writes the conversation and its new images, and removes the images of no message: all or nothing. */
export async function save({ system, messages }) {
  const [transaction, conversation, images] = await begin("readwrite");
  conversation.put(textsOf({ system, messages }), "current");
  const wanted = new Map(imagesOf(messages).map((image) => [image.id, image.blob]));
  images.getAllKeys().onsuccess = ({ target }) => {
    for (const id of target.result) if (!wanted.delete(id)) images.delete(id);
    for (const [id, blob] of wanted) images.put(blob, id);
  };
  await done(transaction);
  remember(UNSAVED, null);
}

/** -> the conversation that was saved last, or undefined. */
export async function load() {
  const [, conversation, images] = await begin("readonly");
  const requests = [conversation.get("current"), images.getAllKeys(), images.getAll()];
  const [saved, ids, blobs] = await Promise.all(requests.map(done));
  const unsaved = attempt(() => JSON.parse(recall(UNSAVED)));
  const whole = unsaved && imagesOf(unsaved.messages).every((image) => ids.includes(image.id));
  const last = whole ? unsaved : saved;
  for (const image of imagesOf(last?.messages ?? [])) image.blob = blobs[ids.indexOf(image.id)];
  return last;
}
