// The network itself: typed arrays and loops, nothing else. Its geometry is the page's JSON, written by html_page.py.
//
// Maps lie pixel by pixel, all maps of a pixel side by side, tower 1 first: value (y, x, map) is at
// (y * side + x) * maps + map. Values are stored as float32 and summed as float64, which is faster in JavaScript.

"use strict";

const BLOCK = 4; // filters and places that the inner loop computes at once

/** The layers. `about` is the page's JSON; `data` is the ArrayBuffer that its offsets point into. */
class Network {
  constructor(about, data) {
    this.about = about;
    this.data = data;
    this.mean = dequantize(data, about.mean);
    this.layers = about.layers.map((layer) => ({
      ...layer,
      bias: new Float32Array(data, layer.bias, layer.towers * layer.maps),
      filters: layer.kernel
        ? packFilters(dequantize(data, layer.weight), layer)
        : { codes: new Int8Array(data, layer.weight.codes, layer.weight.rows * layer.weight.columns),
            scales: new Float32Array(data, layer.weight.scales, layer.weight.rows) },
    }));
    const places = Math.max(...this.layers.map((layer) => padded(layer.side ** 2) * layer.inputs * layer.kernel ** 2));
    this.columns = new Float32Array(places);
  }

  /**
   * Classify a crop: `pixels` is RGB, 0..255, side x side x 3, what a picture becomes in `prepare` and `crop`.
   *
   * `off[t]` switches tower t off: its maps and units are zero after the nonlinearity of layers 1 to 7.
   * `norm` multiplies alpha of response normalization: 1 as trained, 0 without the other maps.
   * `onStep(layer, step, values, side)` sees the output of every layer and of every step behind it.
   */
  run(pixels, { off = [], norm = 1 } = {}, onStep = () => {}) {
    let values = new Float32Array(pixels.length);
    for (let i = 0; i < pixels.length; i++) values[i] = pixels[i] - this.mean[i];
    for (const layer of this.layers) {
      let side = layer.side;
      if (layer.kernel) values = this.convolve(values, layer);
      else values = connect(layer.inputSide > 1 ? mapByMap(values, layer.inputSide) : values, layer);
      onStep(layer, layer.name, values, side);
      for (const step of layer.then) {
        const maps = layer.towers * layer.maps;
        if (step.kind === "activation") activate(values, step.function, maps, off);
        else if (step.kind === "pool") [values, side] = [pool(values, side, maps, step), step.side];
        else if (step.kind === "across-maps") values = normalizeAcross(values, maps, step, norm);
        else if (step.kind === "within-map") values = normalizeWithin(values, side, maps, step, norm);
        onStep(layer, step.name, values, side);
      }
    }
    return softmax(values);
  }

  /**
   * The `count` maps (units) of the layer before to which a unit has the largest weights, largest first.
   *
   * `balance` is 1 if all of these weights are positive, -1 if all are negative.
   */
  strongestInputs(name, unit, count) {
    const layer = this.about.layers.find((one) => one.name === name);
    const { codes, columns } = layer.weight, places = (layer.kernel || layer.inputSide) ** 2;
    const row = new Int8Array(this.data, codes + unit * columns, columns);
    const maps = columns / places, first = layer.inputMaps > maps ? Math.floor(unit / layer.maps) * maps : 0;
    const inputs = Array.from({ length: maps }, (_, map) => {
      let sum = 0, size = 0, strength = 0;
      for (let i = 0; i < places; i++) {
        const code = row[layer.kernel ? i * maps + map : map * places + i];
        sum += code;
        size += Math.abs(code);
        strength += code * code;
      }
      return { map: first + map, balance: size ? sum / size : 0, strength };
    });
    return inputs.sort((a, b) => b.strength - a.strength).slice(0, count);
  }

  /** Convolution as a matrix product: each place of the output becomes a row with all pixels that a filter sees. */
  convolve(input, layer) {
    const { kernel, stride, before, inputSide, side, inputs } = layer;
    const maps = layer.towers * layer.maps;
    const groups = layer.inputMaps / inputs; // towers that keep to themselves, or 1
    const output = new Float32Array(side * side * maps);
    for (let group = 0; group < groups; group++) {
      const columns = this.columns;
      for (let y = 0, row = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          for (let v = y * stride - before, end = v + kernel; v < end; v++) {
            for (let u = x * stride - before, last = u + kernel; u < last; u++, row += inputs) {
              if (v < 0 || u < 0 || v >= inputSide || u >= inputSide) {
                columns.fill(0, row, row + inputs);
                continue;
              }
              const from = (v * inputSide + u) * layer.inputMaps + group * inputs;
              for (let i = 0; i < inputs; i++) columns[row + i] = input[from + i];
            }
          }
        }
      }
      const first = (group * maps) / groups;
      multiply(columns, side * side, layer.filters[group], maps / groups, inputs * kernel * kernel, output, first, maps, layer.bias);
    }
    return output;
  }
}

/** output[place * stride + first + filter] = bias + columns[place] . filters[filter], four by four. */
function multiply(columns, places, filters, count, length, output, first, stride, bias) {
  for (let place = 0; place < places; place += BLOCK) {
    const x0 = place * length, x1 = x0 + length, x2 = x1 + length, x3 = x2 + length;
    for (let filter = 0; filter < count; filter += BLOCK) {
      const w0 = filter * length, w1 = w0 + length, w2 = w1 + length, w3 = w2 + length;
      let a00 = 0, a01 = 0, a02 = 0, a03 = 0, a10 = 0, a11 = 0, a12 = 0, a13 = 0;
      let a20 = 0, a21 = 0, a22 = 0, a23 = 0, a30 = 0, a31 = 0, a32 = 0, a33 = 0;
      for (let i = 0; i < length; i++) {
        const f0 = filters[w0 + i], f1 = filters[w1 + i], f2 = filters[w2 + i], f3 = filters[w3 + i];
        const c0 = columns[x0 + i], c1 = columns[x1 + i], c2 = columns[x2 + i], c3 = columns[x3 + i];
        a00 += c0 * f0; a01 += c0 * f1; a02 += c0 * f2; a03 += c0 * f3;
        a10 += c1 * f0; a11 += c1 * f1; a12 += c1 * f2; a13 += c1 * f3;
        a20 += c2 * f0; a21 += c2 * f1; a22 += c2 * f2; a23 += c2 * f3;
        a30 += c3 * f0; a31 += c3 * f1; a32 += c3 * f2; a33 += c3 * f3;
      }
      const sums = [[a00, a01, a02, a03], [a10, a11, a12, a13], [a20, a21, a22, a23], [a30, a31, a32, a33]];
      for (let p = 0; p < BLOCK && place + p < places; p++) {
        for (let f = 0; f < BLOCK && filter + f < count; f++) {
          output[(place + p) * stride + first + filter + f] = sums[p][f] + bias[first + filter + f];
        }
      }
    }
  }
}

/** A fully connected layer. Its int8 codes are used as they are, which saves three quarters of the memory. */
function connect(input, layer) {
  const { scales } = layer.filters, length = layer.inputs;
  const output = new Float32Array(scales.length), share = (scales.length * length) / input.length; // units that see the same
  for (let first = 0; first < scales.length; first += share) {
    const from = (first / share) * length;
    multiplyCodes(input.subarray(from, from + length), layer.filters.codes.subarray(first * length), output.subarray(first, first + share));
  }
  for (let row = 0; row < scales.length; row++) output[row] = output[row] * scales[row] + layer.bias[row];
  return output;
}

/** output[row] = input . codes[row], four by four. */
function multiplyCodes(input, codes, output) {
  const rows = output.length, length = input.length;
  let row = 0;
  for (; row + BLOCK <= rows; row += BLOCK) {
    const w0 = row * length, w1 = w0 + length, w2 = w1 + length, w3 = w2 + length;
    let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    for (let i = 0; i < length; i++) {
      const value = input[i];
      a0 += value * codes[w0 + i]; a1 += value * codes[w1 + i];
      a2 += value * codes[w2 + i]; a3 += value * codes[w3 + i];
    }
    output[row] = a0; output[row + 1] = a1; output[row + 2] = a2; output[row + 3] = a3;
  }
  for (; row < rows; row++) {
    let sum = 0;
    for (let i = 0; i < length; i++) sum += input[i] * codes[row * length + i];
    output[row] = sum;
  }
}

/** The nonlinearity, in place. Towers that are off become zero. */
function activate(values, name, maps, off) {
  if (name === "relu") for (let i = 0; i < values.length; i++) values[i] = values[i] > 0 ? values[i] : 0;
  else if (name === "tanh") for (let i = 0; i < values.length; i++) values[i] = Math.tanh(values[i]);
  else for (let i = 0; i < values.length; i++) values[i] = 1 / (1 + Math.exp(-values[i]));
  off.forEach((isOff, tower) => {
    if (!isOff) return;
    const share = maps / off.length;
    for (let i = tower * share; i < values.length; i += maps) values.fill(0, i, i + share);
  });
}

/** Max pooling; the last window may hang over the edge. */
function pool(input, side, maps, step) {
  const output = new Float32Array(step.side ** 2 * maps).fill(-Infinity);
  for (let y = 0; y < step.side; y++) {
    for (let x = 0; x < step.side; x++) {
      const to = (y * step.side + x) * maps;
      const bottom = Math.min(y * step.stride + step.size, side), right = Math.min(x * step.stride + step.size, side);
      for (let v = y * step.stride; v < bottom; v++) {
        for (let u = x * step.stride; u < right; u++) {
          const from = (v * side + u) * maps;
          for (let i = 0; i < maps; i++) if (input[from + i] > output[to + i]) output[to + i] = input[from + i];
        }
      }
    }
  }
  return output;
}

/** Response normalization: the squares of `size` neighboring maps at the same place, inside a tower unless joint. */
function normalizeAcross(input, maps, { size, k, alpha, beta, groups }, strength) {
  const output = new Float32Array(input.length), share = maps / groups, half = size >> 1;
  const factor = alpha * strength;
  for (let first = 0; first < input.length; first += share) {
    for (let i = 0; i < share; i++) {
      let sum = 0;
      for (let j = Math.max(0, i - half), end = Math.min(share - 1, i + half); j <= end; j++) sum += input[first + j] ** 2;
      output[first + i] = input[first + i] * negativePower(k + factor * sum, beta);
    }
  }
  return output;
}

/** The same with the squares of a window of the same map; zero outside the map. */
function normalizeWithin(input, side, maps, { size, k, alpha, beta }, strength) {
  const output = new Float32Array(input.length), half = size >> 1, sums = new Float32Array(maps);
  const factor = alpha * strength;
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      sums.fill(0);
      for (let v = Math.max(0, y - half), bottom = Math.min(side - 1, y + half); v <= bottom; v++) {
        for (let u = Math.max(0, x - half), right = Math.min(side - 1, x + half); u <= right; u++) {
          const from = (v * side + u) * maps;
          for (let i = 0; i < maps; i++) sums[i] += input[from + i] ** 2;
        }
      }
      const at = (y * side + x) * maps;
      for (let i = 0; i < maps; i++) output[at + i] = input[at + i] * negativePower(k + factor * sums[i], beta);
    }
  }
  return output;
}

/** base ** -beta; for the paper's 0.75 by square roots, which is faster. */
function negativePower(base, beta) {
  if (beta !== 0.75) return base ** -beta;
  const root = Math.sqrt(base);
  return 1 / (root * Math.sqrt(root));
}

/** Maps one after the other, as layer 6 reads them: (map, y, x). */
function mapByMap(values, side) {
  const places = side * side, maps = values.length / places, output = new Float32Array(values.length);
  for (let place = 0; place < places; place++) {
    for (let map = 0; map < maps; map++) output[map * places + place] = values[place * maps + map];
  }
  return output;
}

function softmax(logits) {
  const highest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((logit) => Math.exp(logit - highest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

function padded(count) {
  return Math.ceil(count / BLOCK) * BLOCK;
}

/** Codes times the scale of their row, as float32. */
function dequantize(data, { codes, scales, rows, columns, bits }) {
  const Codes = bits === 8 ? Int8Array : Int16Array;
  const values = new Codes(data, codes, rows * columns), scale = new Float32Array(data, scales, rows);
  const output = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let i = row * columns, end = i + columns; i < end; i++) output[i] = values[i] * scale[row];
  }
  return output;
}

/** The filters of each tower by themselves (of both together if they see both), filled up to whole blocks. */
function packFilters(weights, layer) {
  const groups = layer.inputMaps / layer.inputs, length = layer.inputs * layer.kernel ** 2;
  const share = (layer.towers * layer.maps) / groups;
  return Array.from({ length: groups }, (_, group) => {
    const filters = new Float32Array(padded(share) * length);
    filters.set(weights.subarray(group * share * length, (group + 1) * share * length));
    return filters;
  });
}

/**
 * A picture as `alexnet predict` prepares it: shorter side to `size`, antialiased, the middle `size` x `size`.
 *
 * `rgba` is what a canvas holds. Returns size x size x 3. Like Pillow's bilinear filter: a triangle as wide as the
 * scale, rows first, rounded once at the end.
 */
function prepare(rgba, width, height, size) {
  const shorter = Math.min(width, height);
  const scaledWidth = Math.floor((size * width + (shorter >> 1)) / shorter);
  const scaledHeight = Math.floor((size * height + (shorter >> 1)) / shorter);
  const across = triangles(width, scaledWidth, (scaledWidth - size) >> 1, size);
  const down = triangles(height, scaledHeight, (scaledHeight - size) >> 1, size);
  const top = down[0].first, bottom = down[size - 1].first + down[size - 1].weights.length;
  const rows = new Float32Array((bottom - top) * size * 3);
  for (let y = top; y < bottom; y++) {
    for (let x = 0; x < size; x++) {
      const { first, weights } = across[x];
      let red = 0, green = 0, blue = 0;
      for (let i = 0, from = (y * width + first) * 4; i < weights.length; i++, from += 4) {
        red += rgba[from] * weights[i]; green += rgba[from + 1] * weights[i]; blue += rgba[from + 2] * weights[i];
      }
      rows.set([red, green, blue], ((y - top) * size + x) * 3);
    }
  }
  const output = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) {
    const { first, weights } = down[y];
    for (let i = 0; i < size * 3; i++) {
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += rows[(first - top + j) * size * 3 + i] * weights[j];
      output[y * size * 3 + i] = Math.round(sum);
    }
  }
  return output;
}

/** For `count` output pixels from `start` on: the first input pixel that counts, and the weights from there on. */
function triangles(input, scaled, start, count) {
  const scale = input / scaled, support = Math.max(1, scale);
  return Array.from({ length: count }, (_, i) => {
    const center = (start + i + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - support + 0.5)), end = Math.min(input, Math.floor(center + support + 0.5));
    const weights = new Float64Array(end - first);
    for (let j = 0; j < weights.length; j++) weights[j] = Math.max(0, 1 - Math.abs((first + j + 0.5 - center) / support));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/** The middle side x side of a prepared picture, size x size x 3. */
function crop(pixels, size, side) {
  const corner = (size - side) >> 1, output = new Uint8Array(side * side * 3);
  for (let y = 0; y < side; y++) {
    const from = ((corner + y) * size + corner) * 3;
    output.set(pixels.subarray(from, from + side * 3), y * side * 3);
  }
  return output;
}

/** Brightness without color, by the weights of television, as Pillow's mode L. */
function withoutColor(pixels) {
  const output = new Uint8Array(pixels.length);
  for (let i = 0; i < pixels.length; i += 3) {
    output.fill((pixels[i] * 19595 + pixels[i + 1] * 38470 + pixels[i + 2] * 7471 + 0x8000) >> 16, i, i + 3);
  }
  return output;
}

/** A copy with a gray square, `edge` pixels wide, its corner at (left, top): the mean image, which is zero for the network. */
function cover(pixels, side, left, top, edge, mean) {
  const output = Float32Array.from(pixels);
  for (let y = top; y < top + edge; y++) {
    const from = (y * side + left) * 3, to = from + edge * 3;
    output.set(mean.subarray(from, to), from);
  }
  return output;
}

/** Corners of the squares of an occlusion map along one side: `count` of them, from edge to edge. */
function squareCorners(side, edge, count) {
  return Array.from({ length: count }, (_, i) => Math.round((i * (side - edge)) / (count - 1)));
}
