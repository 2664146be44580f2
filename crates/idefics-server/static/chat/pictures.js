// Pictures on their way in: read, turned upright, made smaller if they are huge.
//
// The model sees 224 by 224 pixels, and turns no picture by its EXIF data. So a picture is sent as it is where
// the server reads its format and nobody would see a difference, and drawn anew where not.

/** What the server decodes. */
const ACCEPTED = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];
const MAX_SIDE = 2048;
const MAX_BYTES = 3 * 1024 * 1024;
const JPEG_QUALITY = 0.92;

/** A file that cannot be used, with the reason. */
export class PictureError extends Error {}

/**
 * @param {Blob} file
 * @returns {Promise<{blob: Blob, width: number, height: number, name: string}>}
 */
export async function readPicture(file) {
  const name = file.name || "picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new PictureError(`“${name}” is not a picture that this browser can read.`);
  }
  const { width, height } = bitmap;
  try {
    const type = await typeOf(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
    const isTurned = type === "image/jpeg" && (await exifOrientation(file)) > 1;
    if (ACCEPTED.includes(type) && scale === 1 && !isTurned && file.size <= MAX_BYTES) {
      const blob = file.type === type ? file.slice(0, file.size, type) : new Blob([file], { type });
      return { blob, width, height, name };
    }
    return { ...(await redraw(bitmap, scale, type)), name };
  } finally {
    bitmap.close();
  }
}

async function redraw(bitmap, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const draw = (as) => new Promise((resolve) => canvas.toBlob(resolve, as, JPEG_QUALITY));
  // Photographs come as JPEG; anything else may have transparency.
  let blob = await draw(type === "image/jpeg" ? "image/jpeg" : "image/png");
  if (blob && blob.size > MAX_BYTES && blob.type === "image/png") {
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    blob = await draw("image/jpeg");
  }
  if (!blob) throw new PictureError("The picture is too large for this browser.");
  return { blob, width: canvas.width, height: canvas.height };
}

/** By content: names and types that systems report are often wrong. */
async function typeOf(file) {
  const bytes = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...bytes);
  if (text.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (text.startsWith("\x89PNG")) return "image/png";
  if (text.startsWith("GIF8")) return "image/gif";
  if (text.startsWith("BM")) return "image/bmp";
  if (text.startsWith("RIFF") && text.endsWith("WEBP")) return "image/webp";
  return file.type;
}

/** Orientation 1 to 8 from the EXIF segment of a JPEG file; 1 where there is none. */
export async function exifOrientation(file) {
  const view = new DataView(await file.slice(0, 256 * 1024).arrayBuffer());
  try {
    let at = 2;
    while (view.getUint8(at) === 0xff) {
      const marker = view.getUint8(at + 1);
      if (marker === 0xe1 && view.getUint32(at + 4) === 0x45786966) return fromTiff(view, at + 10);
      // The picture itself begins; no EXIF comes behind.
      if (marker === 0xda) return 1;
      at += 2 + view.getUint16(at + 2);
    }
  } catch (error) {
    // Cut short or broken: the decoder decides what to make of it.
    if (!(error instanceof RangeError)) throw error;
  }
  return 1;
}

function fromTiff(view, start) {
  const little = view.getUint16(start) === 0x4949;
  const directory = start + view.getUint32(start + 4, little);
  const count = view.getUint16(directory, little);
  for (let index = 0; index < count; index += 1) {
    const entry = directory + 2 + 12 * index;
    if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
  }
  return 1;
}

/** The picture as the interface takes it. */
export function toDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new PictureError("A picture of this conversation cannot be read any more."));
    reader.readAsDataURL(blob);
  });
}

/** The blob behind a `data:` URI. Not by fetch, which the page's policy does not allow for data. */
export function fromDataUri(uri) {
  const match = /^data:([^;,]*)(;[^,]*)?,(.*)$/s.exec(uri);
  if (!match) throw new PictureError("A picture of the file is no data: URI.");
  const [, type, options = "", data] = match;
  const bytes = options.includes("base64") ? atob(data) : decodeURIComponent(data);
  return new Blob([Uint8Array.from(bytes, (c) => c.charCodeAt(0))], { type });
}
