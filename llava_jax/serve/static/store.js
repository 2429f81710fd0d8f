// What the browser keeps of the conversation: its texts as one record, and each image under its id.

let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open("llava_jax", 1);
    opening.onupgradeneeded = () => ["conversation", "images"].forEach((name) => opening.result.createObjectStore(name));
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
    opening.onblocked = () => reject(new Error("another tab blocks its storage"));
  });
  return opened;
}

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const imagesOf = (messages) => messages.flatMap((m) => m.parts ?? []).flatMap((part) => part.image ?? []);

/** Writes the conversation, new images, and removes the images that are in no message any more: all or nothing. */
export async function save({ system, messages }) {
  const transaction = (await database()).transaction(["conversation", "images"], "readwrite");
  const done = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  const images = transaction.objectStore("images");
  const bare = (part) => (part.image ? { image: { id: part.image.id, name: part.image.name } } : part);
  const texts = messages.map((m) => (m.parts ? { ...m, parts: m.parts.map(bare) } : m));
  transaction.objectStore("conversation").put({ system, messages: texts }, "current");
  const wanted = new Map(imagesOf(messages).map((image) => [image.id, image.blob]));
  images.getAllKeys().onsuccess = ({ target }) => {
    for (const id of target.result) wanted.delete(id) || images.delete(id);
    for (const [id, blob] of wanted) images.put(blob, id);
  };
  await done;
}

/** -> the conversation that was saved last, or undefined. */
export async function load() {
  const transaction = (await database()).transaction(["conversation", "images"]);
  const images = transaction.objectStore("images");
  const [saved, ids, blobs] = await Promise.all([
    result(transaction.objectStore("conversation").get("current")),
    result(images.getAllKeys()),
    result(images.getAll()),
  ]);
  const blobOf = new Map(ids.map((id, i) => [id, blobs[i]]));
  for (const image of imagesOf(saved?.messages ?? [])) image.blob = blobOf.get(image.id);
  return saved;
}
