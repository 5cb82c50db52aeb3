// The pixels that a photograph gives to the network: the same bytes as Pillow makes in `ingest` and `featurize`.

const BITS = 22; // of a weight's fraction: 32, less 8 of a pixel, less 2 for weights whose sum of sizes is above 1
const STRIP = 128; // rows read back at a time: a photograph of 50 megapixels is never in memory twice

/**
 * Decode a picture and stretch it to width x height, RGB, row by row.
 *
 * Colours are taken as they are in the file, without colour management, and transparency lies over white. Browsers turn the
 * picture as its EXIF data say. The promise fails where the browser cannot decode the file.
 */
export async function decode(file, width, height) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const across = weigh(bitmap.width, width);
  const squeezed = new Uint8Array(width * bitmap.height * 3);
  for (let top = 0; top < bitmap.height; top += STRIP) {
    const rows = Math.min(STRIP, bitmap.height - top);
    const strip = readBack(bitmap, top, rows);
    squeezeAcross(strip, bitmap.width, rows, across, squeezed.subarray(top * width * 3));
  }
  const down = weigh(bitmap.height, height);
  bitmap.close();
  return squeezeDown(squeezed, width * 3, down);
}

/** Read rows of a picture as RGBA, its transparency laid over white. */
function readBack(bitmap, top, rows) {
  const context = new OffscreenCanvas(bitmap.width, rows).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, -top);
  return layOverWhite(context.getImageData(0, 0, bitmap.width, rows).data);
}

/**
 * Lay RGBA over white, in place: c * a + 255 * (255 - a), divided by 255 and rounded, in integers as Pillow does it.
 *
 * A canvas keeps c * a / 255 and gives back a colour that may be far from c. Where the browser rounds to the nearest, as
 * Chromium does, the sum is the same all the same; Firefox rounds down, and a half transparent pixel may be one level darker.
 */
function layOverWhite(pixels) {
  for (let i = 0; i < pixels.length; i += 4) {
    const alpha = pixels[i + 3];
    if (alpha === 255) continue;
    for (let channel = i; channel < i + 3; channel++) {
      const sum = (pixels[channel] * alpha + 255 * (255 - alpha) + 128) << 7;
      pixels[channel] = ((sum >> 8) + sum) >> 15;
    }
  }
  return pixels;
}

/**
 * The weights of bicubic resampling along one side: for each pixel to come, the first pixel it takes and the weights of that
 * and the next, in fixed point. Where the side shrinks, the filter widens by as much, so that every pixel counts.
 */
function weigh(from, to) {
  const scale = from / to;
  const widening = Math.max(scale, 1);
  const support = 2 * widening;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const shares = Array.from({ length: end - first }, (_, j) => cubic((j + first - center + 0.5) * (1 / widening)));
    const sum = shares.reduce((total, share) => total + share, 0);
    const weights = shares.map((share) => Math.trunc((share / sum) * 2 ** BITS + (share / sum < 0 ? -0.5 : 0.5)));
    return { first, weights: Int32Array.from(weights) };
  });
}

/** Keys' cubic convolution with a = -1/2. */
function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

const clip = (sum) => Math.min(255, Math.max(0, sum >> BITS));

/** RGBA rows of that width to RGB rows of as many pixels as there are weights. */
function squeezeAcross(pixels, width, rows, across, into) {
  let at = 0;
  for (let row = 0; row < rows; row++) {
    for (const { first, weights } of across) {
      let red = 1 << (BITS - 1), green = red, blue = red; // a half, to round
      let from = (row * width + first) * 4;
      for (let i = 0; i < weights.length; i++, from += 4) {
        const weight = weights[i];
        red = (red + pixels[from] * weight) | 0;
        green = (green + pixels[from + 1] * weight) | 0;
        blue = (blue + pixels[from + 2] * weight) | 0;
      }
      into[at++] = clip(red);
      into[at++] = clip(green);
      into[at++] = clip(blue);
    }
  }
}

/** Rows of that many numbers to as many rows as there are weights. */
function squeezeDown(pixels, stride, down) {
  const squeezed = new Uint8Array(stride * down.length);
  down.forEach(({ first, weights }, row) => {
    for (let column = 0; column < stride; column++) {
      let sum = 1 << (BITS - 1);
      for (let i = 0; i < weights.length; i++) sum = (sum + pixels[(first + i) * stride + column] * weights[i]) | 0;
      squeezed[row * stride + column] = clip(sum);
    }
  });
  return squeezed;
}
